() => {
  const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // translucent grounds are laid over those behind them
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      const alpha = color.length > 3 ? color[3] : 1;
      if (alpha > 0) layers.push([color, alpha]);
      if (alpha === 1) break;
    }
    let made = [255, 255, 255];
    for (const [color, alpha] of layers.reverse()) made = made.map((value, i) => value + alpha * (color[i] - value));
    return made;
  };
  const problems = new Set();
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    if (element.className === "skip") continue;
    const [one, two] = [parse(getComputedStyle(element).color), ground(element)].map(luminance);
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (contrast < 4.5) problems.add(`contrast ${contrast.toFixed(2)}: ${element.tagName} ${element.textContent.slice(0, 30)}`);
    if (!(element instanceof SVGElement) && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflow === "visible" && getComputedStyle(element).display !== "inline")
      problems.add(`text sticks out: ${element.tagName} ${element.textContent.slice(0, 30)}`);
  }
  return [...problems];
}
