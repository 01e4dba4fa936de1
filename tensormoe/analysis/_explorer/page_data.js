// The data, and how numbers are written. Data never become markup: every text goes through
// textContent, every picture through `src`. The parts of the script run as one function.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const ROW = 28;
const kinds = { float32: Float32Array, float64: Float64Array, int32: Int32Array };

// arrays are decoded when they are first asked for
const decoded = new Map();
function unpack(packed) {
  if (packed === null || packed === undefined) return null;
  if (!decoded.has(packed)) {
    const text = atob(packed.base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    packed.base64 = "";
    decoded.set(packed, new kinds[packed.dtype](bytes.buffer));
  }
  return decoded.get(packed);
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function option(value, text) {
  const element = make("option", text);
  element.value = value;
  return element;
}

const className = (index) => data.classes[index] ?? String(index);
const missing = (value) => value === undefined || Number.isNaN(value);
const percent = (value) =>
  missing(value) ? "–" : value === 0 ? "0%" : value < 0.0005 ? value.toExponential(1) : `${(100 * value).toFixed(1)}%`;
const plain = (value) => (missing(value) ? "–" : value.toFixed(3));
const whole = (value) => (missing(value) ? "–" : value.toLocaleString("en"));

const MEASURES = {
  load: ["Load", "mean coefficient", percent],
  frequency: ["Frequency", "share of inputs that use it", percent],
  excess: ["Specialisation", "divergence above its baseline, bits", plain],
  divergence: ["Divergence", "Jensen–Shannon, bits", plain],
  baseline: ["Baseline", "divergence of random inputs, bits", plain],
  polysemanticity: ["Polysemanticity", "0: serves one class alone", plain],
  lost: ["Predictions lost", "right ones that its absence costs", whole],
};

const state = { level: 0, chosen: 0, order: [], edits: data.levels.map(() => new Map()), down: true, cell: [0, 0] };
const levelOf = () => data.levels[state.level];
const values = (name) => unpack(levelOf()[name]);
const measures = () => Object.keys(MEASURES).filter((name) => levelOf()[name]);

function mainClass(expert) {
  const histogram = levelOf().histogram;
  if (!histogram) return -1;
  const width = histogram.classes.shape[1];
  const share = unpack(histogram.values)[expert * width];
  return missing(share) ? -1 : unpack(histogram.classes)[expert * width];
}
