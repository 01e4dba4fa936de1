// One layer in full: drawings, plan, time, memory, and code to copy.
import { byId, make } from "./dom.js";
import { bytes, count, seconds, whole } from "./format.js";

const FRAMEWORKS = { pytorch: "PyTorch", nnx: "Flax NNX", equinox: "Equinox", numpy: "NumPy" };
let framework = "pytorch";

export function showDetails(found, devices) {
  byId("details").hidden = !found;
  if (!found) return;
  byId("details-title").textContent = found.title;
  byId("layers").replaceChildren(...found.layers.flatMap((layer) => layerParts(layer, found.layers.length > 1)));
  byId("steps").replaceChildren(stepTable(found.steps));
  const most = Math.max(...Object.values(found.memory));
  const rows = { parameters: "parameters", forward: "peak, forward", training: "peak, training", saved: "kept for backward" };
  byId("memory-bars").replaceChildren(
    make("tbody", {}, ...Object.entries(rows).map(([name, words]) => make("tr", {}, make("th", { scope: "row" }, words), make("td", {}, bar(found.memory[name], most, words)), make("td", {}, bytes(found.memory[name])))))
  );
  byId("legs-part").hidden = !found.legs.length;
  byId("legs").replaceChildren(legTable(found.legs, devices));
  showCode(found.code);
}

/** A drawing is a picture: nothing in it runs, and nothing of it is part of the page. */
function drawing(svg, words) {
  const address = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  return make("div", { class: "drawing scroll", tabindex: 0, role: "region", "aria-label": words }, make("img", { src: address, alt: words }));
}

function layerParts(layer, several) {
  const { spec, dense } = layer;
  const words = `${spec.experts.join(" × ")} experts of ${whole(spec.in_features)} → ${whole(spec.out_features)}`;
  const facts = `${words}; expert rank ${whole(layer.expert_rank)}, expert span ${whole(layer.expert_span)}. As many dense experts would have ${count(dense.parameters)} parameters and take ${count(dense.flops)} FLOPs.`;
  const shapes = Object.entries(layer.shapes).map(([name, shape]) => `${name} (${shape.join(", ")})`);
  const plan = make("details", {}, make("summary", {}, "Plan, step by step"), drawing(layer.program, `Steps of the plan: ${words}`), make("pre", { tabindex: 0 }, layer.plan));
  return [
    several ? make("h3", {}, `The ${layer.name} layer`) : null,
    make("p", {}, facts),
    make("p", { class: "quiet" }, `Arrays: ${shapes.join(", ")}`),
    drawing(layer.network, `Tensor network: ${words}`),
    plan,
  ].filter(Boolean);
}

function bar(value, most, words) {
  return make("meter", { min: 0, max: most || 1, value, "aria-label": words });
}

function stepTable(steps) {
  const most = Math.max(...steps.map((step) => step.time), 0);
  const head = make("tr", {}, ...["step", "FLOPs", "moved", "time", ""].map((text) => make("th", { scope: "col" }, text)));
  const body = steps.map((step) =>
    make(
      "tr",
      {},
      make("td", { class: "words" }, step.count > 1 ? `${step.label} × ${step.count}` : step.label),
      make("td", {}, count(step.matmul_flops + step.elementwise_flops)),
      make("td", {}, bytes(step.bytes_read + step.bytes_written)),
      make("td", {}, seconds(step.time)),
      make("td", {}, bar(step.time, most, `time of ${step.label}`))
    )
  );
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function legTable(legs, devices) {
  const names = ["leg", "parameters of each", "memory", "exchanged", `time on ${whole(devices)}`];
  const head = make("tr", {}, ...names.map((text) => make("th", { scope: "col" }, text)));
  const body = legs.map((leg) => make("tr", {}, make("th", { scope: "row" }, leg.leg), make("td", {}, count(leg.parameters)), make("td", {}, bytes(leg.memory)), make("td", {}, bytes(leg.communicated)), make("td", {}, seconds(leg.time))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function showCode(code) {
  const shown = code[framework] === undefined ? Object.keys(code)[0] : framework;
  byId("code").textContent = code[shown] ?? "";
  byId("copied").textContent = "";
  const choose = (name) => () => {
    framework = name;
    showCode(code);
    document.querySelector(`[data-framework="${name}"]`).focus();
  };
  byId("frameworks").replaceChildren(
    ...Object.keys(code).map((name) => make("button", { type: "button", "data-framework": name, "aria-pressed": String(name === shown), onclick: choose(name) }, FRAMEWORKS[name] ?? name))
  );
}

/** Whether a text is on the clipboard now: pages without https have none. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

export async function copyCode() {
  const code = byId("code");
  const copied = await copyText(code.textContent);
  if (!copied) getSelection().selectAllChildren(code);
  byId("copied").textContent = copied ? "Copied." : "Selected: press Ctrl-C.";
}
