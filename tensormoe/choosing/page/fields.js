// The form, the address and the question are three forms of one state: texts by field.
import { byId, make } from "./dom.js";

const LIMITS = ["parameters", "flops", "memory", "time"];
const FLAGS = ["bias", "gate_in_budget", "training"];
// of the page alone, and no part of a question
const SHOWN = ["cost"];
const FIELDS = [
  ...["kind", "in_features", "hidden_features", "out_features", "experts", "budget", ...LIMITS],
  ...["objective", "gate", "top_k", "batch", "dtype", "device", "devices", "selected", "rank"],
];

const sizes = [];
for (let size = 16; size <= 32768; size *= 2) sizes.push(size, 1.5 * size);
const powers = Array.from({ length: 21 }, (_, index) => 2 ** index);
const amounts = ["10k", "20k", "50k", "100k", "200k", "500k"];
for (const unit of ["M", "G"]) for (const value of [1, 2, 5, 10, 20, 50, 100, 200, 500]) amounts.push(`${value}${unit}`);
const SLIDERS = {
  in_features: sizes,
  hidden_features: sizes,
  out_features: sizes,
  experts: powers.slice(0, 21),
  parameters: amounts.slice(0, 17),
  top_k: [1, 2, 3, 4, 6, 8, 12, 16, 32, 64],
  batch: powers.slice(0, 18),
  devices: powers.slice(0, 10),
};
const MEASURED = {
  this: "this machine, as measured",
  "this-numpy": "this machine, NumPy",
  "this-torch": "this machine, PyTorch",
  "this-jax": "this machine, JAX",
};
const UNITS = { k: 1e3, m: 1e6, g: 1e9 };

const defaults = {};
let names = [];
let resolved = {};

/** Put sliders beside the fields, and take what the page says for the defaults. */
export function prepare(engine) {
  names = engine.factorizations;
  // a small screen has room for the results
  if (matchMedia("(max-width: 820px)").matches) for (const group of document.querySelectorAll(".group")) group.open = false;
  const device = byId("device");
  const measured = engine.measured ?? [];
  device.prepend(...measured.map((value) => make("option", { value }, MEASURED[value])));
  if (measured.length) device.value = measured[0];
  for (const name of [...FIELDS, ...SHOWN]) defaults[name] = byId(name).value;
  for (const name of FLAGS) defaults[name] = byId(name).checked ? "yes" : "no";
  defaults.factorizations = "";
  for (const [name, steps] of Object.entries(SLIDERS)) {
    const text = byId(name);
    const label = `${text.labels[0].textContent}, slider`;
    const slider = make("input", { type: "range", min: 0, max: steps.length - 1, step: 1, "aria-label": label, "data-slider": name });
    if (LIMITS.includes(name)) slider.style.gridColumn = "1 / -1";
    slider.addEventListener("input", () => {
      text.value = String(steps[slider.value]);
      slider.setAttribute("aria-valuetext", text.value);
    });
    text.after(slider);
  }
  for (const name of names) addName(name);
}

function addName(name) {
  const box = make("input", { type: "checkbox", value: name, "data-compared": true });
  box.checked = true;
  byId("compared").append(make("label", {}, box, ` ${name}`));
  byId("selected").append(make("option", { value: name }, name));
}

const boxes = () => [...document.querySelectorAll("[data-compared]")];

/** The form as texts. */
export function readForm() {
  const state = {};
  for (const name of [...FIELDS, ...SHOWN]) state[name] = byId(name).value.trim();
  for (const name of FLAGS) state[name] = byId(name).checked ? "yes" : "no";
  const chosen = boxes().filter((box) => box.checked);
  state.factorizations = chosen.length === boxes().length ? "" : chosen.map((box) => box.value).join(",") || "none";
  return state;
}

/** Texts into the form; what is missing is the default. */
export function writeForm(given) {
  const state = { ...defaults, ...given };
  const listed = state.factorizations.split(",").filter((name) => name && name !== "none");
  for (const name of listed) {
    if (names.includes(name)) continue;
    names = [...names, name];
    addName(name);
  }
  for (const name of [...FIELDS, ...SHOWN]) {
    const field = byId(name);
    field.value = state[name];
    if (field.tagName === "SELECT" && field.value !== state[name]) {
      // kept as it was shared, so that its message stands beside it
      field.append(make("option", { value: state[name] }, state[name]));
      field.value = state[name];
    }
  }
  for (const name of FLAGS) byId(name).checked = state[name] === "yes";
  for (const box of boxes()) box.checked = state.factorizations === "" || listed.includes(box.value);
  follow();
}

/** What the engine made of fields that are empty. */
export function setResolved(request) {
  resolved = request;
  follow();
}

/** Sliders and fields that depend on others. */
export function follow() {
  for (const slider of document.querySelectorAll("[data-slider]")) {
    const name = slider.dataset.slider;
    const text = (byId(name).value.trim() || String(resolved[name] ?? resolved.budget?.[name] ?? "")).toLowerCase();
    const steps = SLIDERS[name].map(amount);
    const parts = name === "experts" ? text.split(/[x×,]/) : [text];
    const value = parts.map(amount).reduce((product, part) => product * part, 1);
    if (!(value > 0)) continue;
    const above = steps.findIndex((step) => step >= value);
    slider.value = above < 0 ? steps.length - 1 : above;
    slider.setAttribute("aria-valuetext", text);
  }
  const embedding = byId("kind").value === "embedding";
  byId("limits").hidden = byId("budget").value !== "limits";
  byId("gate_in_budget").disabled = byId("budget").value === "" || embedding;
  for (const name of ["bias", "gate"]) byId(name).disabled = embedding;
  document.querySelector("label[for=in_features]").textContent = embedding ? "Ids" : "In features";
}

function amount(text) {
  const match = /^([0-9.]+)([kmg]?)$/i.exec(String(text));
  return match ? Number(match[1]) * (UNITS[match[2].toLowerCase()] ?? 1) : NaN;
}

/** What the engine is asked. Fields that are empty are left to it. */
export function question(state) {
  const asked = {};
  for (const name of FIELDS) if (!LIMITS.includes(name) && name !== "budget" && state[name] !== "") asked[name] = state[name];
  for (const name of FLAGS) asked[name] = state[name] === "yes";
  if (state.factorizations) asked.factorizations = state.factorizations.split(",").filter((name) => name !== "none");
  if (state.budget === "limits") {
    asked.budget = Object.fromEntries(LIMITS.filter((name) => state[name]).map((name) => [name, state[name]]));
  } else if (state.budget) {
    asked.budget = state.budget;
  }
  if (state.kind === "embedding") {
    delete asked.bias;
    delete asked.gate;
  }
  if (state.budget === "") delete asked.gate_in_budget;
  return asked;
}

/** The address of a state: what differs from the defaults, and the sizes. */
export function toHash(state) {
  const kept = Object.entries(state).filter(
    ([name, value]) => value !== defaults[name] || ["in_features", "out_features", "experts"].includes(name)
  );
  return `#${new URLSearchParams(kept)}`;
}

/** The state of an address; words that are no field's are left out. */
export function fromHash(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  return Object.fromEntries([...given].filter(([name]) => name in defaults));
}

/** As many experts, in levels whose sizes are as near to one another as divisors are. */
export function split(text, count) {
  let rest = text.toLowerCase().split(/[x×,]/).map(Number).reduce((product, part) => product * part, 1);
  if (!Number.isSafeInteger(rest) || rest < 1) return text;
  const found = [];
  for (let left = count; left > 1; left--) {
    let size = Math.max(Math.floor(rest ** (1 / left) + 1e-9), 1);
    while (rest % size) size--;
    found.push(size);
    rest /= size;
  }
  return [...found, rest].join("x");
}

/** Messages beside the fields that they belong to. */
export function showErrors(errors) {
  for (const old of document.querySelectorAll("form .error")) old.remove();
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    describe(field, byId(`${field.id}-hint`)?.id);
  }
  const general = [];
  for (const { field, message } of errors) {
    const place = document.querySelector(`[data-field="${CSS.escape(field)}"]`);
    if (!place) {
      general.push(message);
      continue;
    }
    const id = `error-${field}`;
    place.append(make("p", { id, class: "error" }, message));
    for (const closed of [place, place.closest(".group")]) if (closed?.tagName === "DETAILS") closed.open = true;
    const control = controlOf(field, message);
    if (!control) continue;
    control.setAttribute("aria-invalid", "true");
    describe(control, byId(`${control.id}-hint`)?.id, id);
  }
  byId("error-").textContent = general.join(" ");
  byId("error-").hidden = !general.length;
}

function controlOf(field, message) {
  if (field === "factorizations") return boxes()[0];
  // a message on a limit begins with its name
  const limit = field === "budget" && byId("budget").value === "limits" && LIMITS.find((name) => message.startsWith(name));
  return byId(limit || field);
}

function describe(field, ...ids) {
  const said = ids.filter(Boolean).join(" ");
  if (said) field.setAttribute("aria-describedby", said);
  else field.removeAttribute("aria-describedby");
}
