// Rows of the table: what the budget buys, what the gate takes, and what it is compared with.
import { byId, make } from "./dom.js";
import { bytes, count, levels, quantity, rank, seconds, whole } from "./format.js";
import { mark } from "./plot.js";

const AIMS = { capacity: "capacity", expert_rank: "expert rank", expert_span: "expert span" };

/** The rows of factorizations. `actions` has `select` and `change`. */
export function showRows(response, actions) {
  const best = response.best?.name;
  const selected = response.request.selected ?? best;
  const made = response.rows.map((row, index) => {
    const words = row.name === best ? `★ ${row.name}` : row.name;
    const name = row.feasible
      ? make("button", { type: "button", class: "plain", "data-select": row.name, "aria-pressed": String(row.name === selected), onclick: () => actions.select(row.name) }, words)
      : row.name;
    const head = make("th", { scope: "row" }, mark(index), name);
    const line = make("tr", { "data-name": row.name, "aria-selected": String(row.name === selected) }, head);
    if (row.name === best) line.className = "best";
    if (row.feasible) line.append(...figures(row));
    else {
      const why = row.smallest_budget ? `Too large: it needs ${said(row.smallest_budget)}.` : row.message;
      line.classList.add("infeasible");
      line.append(make("td", { colspan: 7, class: "words", title: row.message }, make("div", {}, why, ...remedies(row, response.request, actions))));
    }
    return line;
  });
  const held = document.activeElement?.dataset?.select;
  byId("rows").replaceChildren(...made);
  if (held) document.querySelector(`[data-select="${CSS.escape(held)}"]`)?.focus();
  byId("gate-row").replaceChildren(...(response.gate ? [plain({ name: "gate", ...response.gate }, "in every row above")] : []));
  showBest(response, actions);
}

export function showBaselines(rows) {
  byId("baselines").replaceChildren(
    ...rows.map((row) =>
      row.feasible
        ? plain(row, row.note)
        : make("tr", { class: "infeasible", "data-name": row.name }, make("th", { scope: "row" }, row.name), make("td", { colspan: 7, class: "words" }, row.message))
    )
  );
}

function plain(row, note) {
  const head = make("th", { scope: "row" }, row.name);
  if (note) head.append(make("div", { class: "note" }, note));
  return make("tr", { "data-name": row.name }, head, ...figures(row));
}

function figures(row) {
  const ranks = row.ranks ?? [];
  const said = ranks.length > 1 ? ranks.map(rank).join(" and ") : rank(row.rank);
  const cell = (text, exact) => make("td", { title: exact === undefined ? null : String(exact) }, text);
  return [
    make("td", { "data-rank": ranks.map(rank).join(" ") }, said),
    cell(count(row.parameters), row.parameters),
    cell(count(row.flops), row.flops),
    cell(bytes(row.memory), row.memory),
    cell(seconds(row.time), row.time),
    cell(whole(row.expert_rank)),
    cell(whole(row.expert_span)),
  ];
}

function remedies(row, request, actions) {
  const needed = row.smallest_budget ?? {};
  const buttons = [];
  const offer = (text, change) => buttons.push(make("button", { type: "button", onclick: () => actions.change(change) }, text));
  const within = (amounts) => Object.entries(amounts).every(([name, value]) => value <= (request.budget[name] ?? Infinity));
  for (const { change, smallest_budget: taken } of row.alternatives ?? []) {
    const more = within(taken) ? {} : raised(request, taken);
    const words = within(taken) ? "" : `, with ${said(taken)}`;
    if (change.experts) offer(`${levels(change.experts)} experts${words}`, { experts: levels(change.experts), ...more });
    if (change.gate === false) offer(`gate on top of the budget${words}`, { gate_in_budget: "no", ...more });
  }
  if (Object.keys(needed).length) offer(`budget of ${said(needed)}`, raised(request, needed));
  return buttons.length ? [make("div", { class: "chips" }, ...buttons)] : [];
}

const said = (amounts) =>
  Object.entries(amounts)
    .map(([name, value]) => (name === "parameters" ? `${whole(value)} parameters` : `${quantity[name](value)} of ${name}`))
    .join(" and ");

/** The state of a budget that is as large as needed. Its limits keep their units. */
function raised(request, needed) {
  const limits = { ...request.budget, ...needed };
  const change = { budget: "limits", gate_in_budget: request.gate_in_budget ? "yes" : "no" };
  for (const name of Object.keys(quantity)) change[name] = limits[name] === undefined ? "" : name === "time" ? `${limits[name]}s` : String(Math.ceil(limits[name]));
  return change;
}

function showBest(response, actions) {
  const best = response.best;
  byId("best").textContent = best ? `★ ${best.name}: ${best.reason}.` : "Nothing fits the budget.";
  const objective = response.request.objective;
  const held = document.activeElement?.dataset?.aim;
  byId("aims").replaceChildren(
    ...Object.entries(AIMS).map(([name, words]) =>
      make(
        "button",
        { type: "button", "data-aim": name, "aria-pressed": String(name === objective), onclick: () => actions.change({ objective: name, selected: "", rank: "" }) },
        `for ${words}`
      )
    )
  );
  if (held) document.querySelector(`[data-aim="${held}"]`)?.focus();
  const limits = Object.keys(response.request.budget).length ? said(response.request.budget) : "none";
  const gate = !response.request.gate ? "" : response.request.gate_in_budget ? ", which covers the gate" : ", the gate on top";
  const device = response.request.device.name;
  byId("notes").textContent = `Budget: ${limits}${gate}. Time is predicted for ${device}, of a call on ${whole(response.request.batch)} inputs${response.request.training ? ", forward and backward" : ""}.`;
}
