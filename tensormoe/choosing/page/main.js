// A change in the form becomes a question; answers come part by part, the newest question first.
import { byId, make } from "./dom.js";
import { copyCode, copyText, showDetails } from "./details.js";
import { openEngine } from "./engine.js";
import { follow, fromHash, prepare, question, readForm, setResolved, showErrors, split, toHash, writeForm } from "./fields.js";
import { rank as inWords } from "./format.js";
import { showPlot } from "./plot.js";
import { showBaselines, showRows } from "./table.js";

const KEPT = 60;
const PAUSE = 300;

let engine = null;
let committed = "";
let wanted = 0;
let running = false;
let stop = new AbortController();
let frontsWanted = false;
const answers = new Map();
const shown = { rows: [], fronts: {}, baselines: [], request: null, best: null };

const status = (text) => (byId("status").textContent = text);

// ---------------------------------------------------------------- address and form

/** The form has changed for good: a step of the browser's history. */
function commit() {
  const hash = toHash(readForm());
  if (hash !== committed) {
    history.replaceState(null, "", committed);
    history.pushState(null, "", hash);
    committed = hash;
  }
  update();
}

/** The form is changing: the address follows, and the history does not. */
function glide() {
  history.replaceState(null, "", toHash(readForm()));
  update();
}

function change(changes) {
  writeForm({ ...readForm(), ...changes });
  commit();
}

function pick(name, rank) {
  const same = readForm().selected === name;
  if (rank === null) change({ selected: same && !readForm().rank ? "" : name, rank: "" });
  else change({ selected: name, rank: inWords(rank) === "–" ? "" : inWords(rank) });
}

// ---------------------------------------------------------------- questions and answers

async function ask(parts, more = {}) {
  const asked = { ...question(readForm()), parts, ...more };
  const key = JSON.stringify(asked);
  if (!answers.has(key)) {
    const found = await engine.explore(asked, stop.signal);
    answers.set(key, found);
    if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  }
  return answers.get(key);
}

/** Ask until the answer that is shown is the one to the newest state of the form. */
async function update() {
  wanted++;
  follow();
  if (!engine) return;
  byId("results").setAttribute("aria-busy", "true");
  if (running) return void stop.abort();
  running = true;
  for (let turn = 0; turn !== wanted; ) {
    turn = wanted;
    stop = new AbortController();
    try {
      await show(() => turn === wanted);
    } catch (error) {
      if (error.name !== "AbortError") {
        byId("results").classList.add("stale");
        byId("results").setAttribute("aria-busy", "false");
        status(`No answer: ${error.message}. ${engine.engine === "server" ? "Is tensormoe choose still running?" : "Load the page again."}`);
      }
    }
  }
  running = false;
}

async function show(isNewest) {
  const started = performance.now();
  const measured = (name) => performance.measure(name, { start: started, end: performance.now() });
  const results = byId("results");
  const response = await ask(["rows"]);
  if (!isNewest()) return;
  showErrors(response.errors);
  results.classList.toggle("stale", response.errors.length > 0);
  if (response.errors.length) {
    status(`${response.errors.length === 1 ? "One field is" : `${response.errors.length} fields are`} impossible; the results are of the fields before.`);
    results.setAttribute("aria-busy", "false");
    return;
  }
  setResolved(response.request);
  const fronts = sameFronts(response.request) ? shown.fronts : {};
  Object.assign(shown, { rows: response.rows, request: response.request, best: response.best, fronts });
  showRows(response, { select: (name) => pick(name, null), change });
  redraw();
  measured("explorer-update");
  const { baselines } = await ask(["baselines"]);
  if (!isNewest()) return;
  shown.baselines = baselines;
  showBaselines(baselines);
  redraw();
  const { selected } = await ask(["selected"]);
  if (!isNewest()) return;
  showDetails(selected, response.request.devices);
  measured("explorer-whole");
  if (!performance.getEntriesByName("explorer-ready").length) performance.mark("explorer-ready");
  results.setAttribute("aria-busy", "false");
  status("");
  await showFronts(isNewest);
}

/** Whether the fronts that are shown are those of a request: they do not depend on what is chosen. */
function sameFronts(request) {
  const [one, two] = [request, shown.request].map((each) => JSON.stringify({ ...each, selected: null, rank: null, parts: null }));
  return one === two;
}

/** Fronts come last, one after another: only they take long. */
async function showFronts(isNewest) {
  const { request, rows } = shown;
  // limits other than these need a plan for every rank
  const slow = Object.keys(request.budget).some((name) => name !== "parameters");
  const single = request.kind === "layer";
  byId("draw-fronts").hidden = !single || !slow || frontsWanted;
  byId("plot-note").textContent = single ? "" : "Fronts are of single layers.";
  if (!single || (slow && !frontsWanted)) return;
  await new Promise((resolve) => setTimeout(resolve, PAUSE));
  for (const { name, feasible } of rows) {
    if (!isNewest()) return;
    if (!feasible) continue;
    byId("plot-note").textContent = slow ? `Drawing ${name} …` : "";
    const bare = { factorizations: [name], selected: null, rank: null };
    shown.fronts[name] = (await ask(["fronts"], bare)).fronts?.[name] ?? [];
    if (!isNewest()) return;
    redraw();
  }
  byId("plot-note").textContent = "";
  performance.mark("explorer-fronts");
}

function redraw() {
  if (!shown.request) return;
  const selected = shown.request.selected ?? shown.best?.name;
  showPlot({ ...shown, cost: byId("cost").value, selected, pick });
  showFront(selected);
}

/** The front of the chosen factorization as a list, for those who do not click. */
function showFront(name) {
  const front = shown.fronts[name] ?? [];
  byId("front-part").hidden = front.length < 2;
  byId("front-name").textContent = name;
  const row = shown.rows.find((each) => each.name === name);
  byId("front").replaceChildren(
    ...front.map((each) => {
      const words = `${inWords(each.rank)}: expert rank ${each.expert_rank}, span ${each.expert_span}, ${each.parameters.toLocaleString("en")} parameters`;
      return make("option", { value: inWords(each.rank) }, words);
    })
  );
  byId("front").value = inWords(row?.rank);
}

// ---------------------------------------------------------------- start

function listen() {
  const form = byId("form");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", glide);
  form.addEventListener("change", commit);
  for (const button of document.querySelectorAll("[data-levels]")) {
    button.addEventListener("click", () => change({ experts: split(byId("experts").value, Number(button.dataset.levels)) }));
  }
  byId("reset").addEventListener("click", () => {
    writeForm({});
    commit();
  });
  byId("cost").addEventListener("change", () => {
    commit();
    redraw();
  });
  byId("draw-fronts").addEventListener("click", () => {
    frontsWanted = true;
    update();
  });
  byId("front").addEventListener("change", () => pick(byId("front-name").textContent, byId("front").value));
  byId("share").addEventListener("click", async () => {
    const copied = await copyText(location.href);
    byId("shared").textContent = copied ? "Copied." : "Copy the address above.";
  });
  byId("copy").addEventListener("click", copyCode);
  window.addEventListener("popstate", () => {
    writeForm(fromHash(location.hash));
    committed = location.hash;
    update();
  });
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    redraw();
  }).observe(byId("plot"));
}

async function start() {
  status("Starting …");
  try {
    const found = await openEngine((text) => status(`${text} …`));
    prepare(found);
    writeForm(fromHash(location.hash));
    committed = toHash(readForm());
    history.replaceState(null, "", committed);
    listen();
    engine = found;
  } catch (error) {
    status(`The page has no engine: ${error.message}. With tensormoe installed, run: tensormoe choose`);
    byId("results").setAttribute("aria-busy", "false");
    return;
  }
  byId("form").inert = false;
  await update();
  if (engine.engine === "pyodide" && "serviceWorker" in navigator) {
    await navigator.serviceWorker.register("offline.js");
  }
}

start();
