// Every expert by its load and a measure.

const scatter = byId("scatter");
let dots = null;

function fitted(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const brush = canvas.getContext("2d");
  brush.scale(ratio, ratio);
  return brush;
}

function drawScatter() {
  const width = scatter.clientWidth;
  const height = scatter.clientHeight;
  const brush = fitted(scatter, width, height);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const name = byId("measure").value;
  const load = values("load");
  const measure = values(name);
  let [low, high, bottom, top, none] = [Infinity, 0, Infinity, -Infinity, 0];
  for (let i = 0; i < load.length; i++) {
    if (load[i] > 0) {
      low = Math.min(low, load[i]);
      high = Math.max(high, load[i]);
    }
    if (missing(measure[i])) none++;
    else {
      bottom = Math.min(bottom, measure[i]);
      top = Math.max(top, measure[i]);
    }
  }
  if (!(high > 0)) [low, high] = [0.5, 1];
  if (!(top >= bottom)) [bottom, top] = [0, 1];
  if (top - bottom < 1e-9) [bottom, top] = [bottom - 0.5, top + 0.5];
  low = Math.max(low, high * 1e-6);
  if (high / low < 1.05) [low, high] = [low / 2, high * 2];
  const box = { left: 48, right: width - 12, top: 8, bottom: height - 34 };
  const x = (value) =>
    value > 0
      ? box.left + 14 + ((box.right - box.left - 14) * Math.log(Math.max(value, low) / low)) / Math.log(high / low)
      : box.left;
  const y = (value) => box.bottom - ((box.bottom - box.top) * (value - bottom)) / (top - bottom);
  byId("meaning").textContent = MEASURES[name][1];
  brush.font = "11px system-ui, sans-serif";
  brush.strokeStyle = colour("--line");
  brush.fillStyle = colour("--quiet");
  brush.strokeRect(box.left - 6, box.top - 4, box.right - box.left + 12, box.bottom - box.top + 8);
  const format = MEASURES[name][2];
  brush.textAlign = "right";
  for (const part of [0, 0.5, 1]) brush.fillText(format(bottom + part * (top - bottom)), box.left - 10, y(bottom + part * (top - bottom)) + 4);
  brush.textAlign = "left";
  brush.fillText(percent(low), x(low), height - 18);
  brush.textAlign = "right";
  brush.fillText(percent(high), box.right + 4, height - 18);
  brush.textAlign = "center";
  brush.fillText("load (logarithmic; unused at the left)", (box.left + box.right) / 2, height - 4);
  const size = load.length > 1000 ? 2 : 3.5;
  dots = { x: new Float32Array(load.length), y: new Float32Array(load.length) };
  brush.fillStyle = `rgba(${colour("--dot")}, ${load.length > 1000 ? 0.45 : 0.75})`;
  for (let i = 0; i < load.length; i++) {
    dots.x[i] = x(load[i]);
    dots.y[i] = missing(measure[i]) ? box.bottom + 2 : y(measure[i]);
    brush.beginPath();
    brush.arc(dots.x[i], dots.y[i], size, 0, 7);
    brush.fill();
  }
  brush.strokeStyle = colour("--ink");
  brush.lineWidth = 2;
  brush.beginPath();
  brush.arc(dots.x[state.chosen], dots.y[state.chosen], size + 3, 0, 7);
  brush.stroke();
  const without = none ? ` ${none} without a value are at the bottom.` : "";
  scatter.setAttribute(
    "aria-label",
    `${load.length} experts by load, ${percent(low)} to ${percent(high)}, and ${MEASURES[name][0].toLowerCase()}, ` +
      `${format(bottom)} to ${format(top)}.${without} The list of experts has the same numbers.`
  );
}

function nearestDot(event) {
  const frame = scatter.getBoundingClientRect();
  const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
  let [best, least] = [-1, 400];
  for (let i = 0; i < dots.x.length; i++) {
    const distance = (dots.x[i] - x) ** 2 + (dots.y[i] - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

scatter.addEventListener("click", (event) => {
  const found = nearestDot(event);
  if (found >= 0) choose(found);
});
scatter.addEventListener("mousemove", (event) => {
  const found = nearestDot(event);
  const tip = byId("tip");
  tip.hidden = found < 0;
  if (found < 0) return;
  const main = mainClass(found);
  tip.textContent = `expert ${found}${main < 0 ? "" : ` · ${className(main).slice(0, 30)}`}`;
  tip.style.left = `${Math.min(dots.x[found] + 8, scatter.clientWidth - tip.offsetWidth - 2)}px`;
  tip.style.top = `${Math.max(dots.y[found] - 28, 0)}px`;
});
scatter.addEventListener("mouseleave", () => (byId("tip").hidden = true));
