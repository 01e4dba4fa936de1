// Runs in an open page, and returns what is wrong with how it looks: a list of sentences.
async ({ wide }) => {
  await document.fonts.ready;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const problems = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (element) =>
    element.getClientRects().length > 0 &&
    element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const called = (element) => {
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
    const kind = [element.tagName.toLowerCase(), ...element.classList].join(".");
    return text ? `${kind} “${text}”` : kind;
  };
  const ancestors = function* (element) {
    for (let each = element.parentElement; each; each = each.parentElement) yield each;
  };

  // Nothing is wider than the screen, unless it scrolls by itself.
  const page = document.documentElement;
  if (page.scrollWidth > window.innerWidth) {
    problems.push(`the page is ${page.scrollWidth} pixels wide`);
  }
  const sticksOut = (element) => {
    const box = element.getBoundingClientRect();
    return box.right > window.innerWidth + 1 || box.left < -1;
  };
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  for (const element of all(".md-content *, .md-footer *")) {
    // parts of drawings, and formulas as screen readers get them
    if (element.closest("svg *, .katex-mathml")) continue;
    if (!shown(element) || !sticksOut(element) || sticksOut(element.parentElement)) continue;
    if ([...ancestors(element)].some(scrolls)) continue;
    problems.push(`sticks out: ${called(element)}`);
  }

  // Signatures are whole at every width, and code of 80 columns where there is room for it.
  const cut = (element) => element.scrollWidth > element.clientWidth + 1;
  for (const element of all(".doc-signature pre, .doc-signature code, .doc-heading")) {
    if (element.clientWidth && cut(element)) problems.push(`cut: ${called(element)}`);
  }
  if (wide) {
    for (const element of all(".md-typeset pre > code")) {
      if (shown(element) && cut(element)) problems.push(`code wider than its box: ${called(element)}`);
    }
  }
  for (const element of all("td code")) {
    if (element.getClientRects().length > 1) problems.push(`a name broken: ${called(element)}`);
  }

  // Pictures are there, and formulas typeset.
  for (const image of all("img")) {
    if (!image.complete || !image.naturalWidth) problems.push(`no picture: ${image.src}`);
  }
  for (const element of all(".arithmatex")) {
    if (!element.querySelector(".katex")) problems.push(`not typeset: ${called(element)}`);
  }

  // Text has the contrast that WCAG AA asks for.
  const parse = (color) => {
    const [red, green, blue, alpha = 1] = color.match(/[\d.]+/g).map(Number);
    return [red, green, blue, alpha];
  };
  const over = ([...top], below) => [
    ...top.slice(0, 3).map((value, index) => value * top[3] + below[index] * (1 - top[3])),
    1,
  ];
  const ground = (element) => {
    const layers = [];
    for (const each of [element, ...ancestors(element)]) {
      const style = getComputedStyle(each);
      if (style.backgroundImage !== "none") return null;
      const layer = parse(style.backgroundColor);
      if (layer[3] > 0) layers.push(layer);
      if (layer[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const [red, green, blue] = color
      .map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const seen = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("script, style, svg")) continue;
    const style = getComputedStyle(element);
    const key = `${style.color} ${style.fontSize} ${element.tagName}.${element.className}`;
    if (seen.has(key) || !shown(element)) continue;
    seen.add(key);
    const below = ground(element);
    if (!below) continue;
    const [one, other] = [luminance(below), luminance(over(parse(style.color), below))];
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < (large ? 3 : 4.5)) {
      problems.push(`contrast ${contrast.toFixed(2)}: ${called(element)}`);
    }
  }
  return problems;
}
