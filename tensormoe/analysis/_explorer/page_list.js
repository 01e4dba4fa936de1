// The list of experts.

const list = byId("list");
const space = byId("space");
const pool = [];

function columnOfList() {
  const sort = byId("sort").value;
  return sort === "number" || sort === "load" ? measures().find((name) => name !== "load") : sort;
}

function refilter() {
  const query = byId("search").value.trim().toLowerCase();
  const sort = byId("sort").value;
  const found = [];
  for (let expert = 0; expert < levelOf().experts; expert++) {
    if (query) {
      const main = mainClass(expert);
      const byClass = main >= 0 && className(main).toLowerCase().includes(query);
      if (!byClass && !String(expert).startsWith(query)) continue;
    }
    found.push(expert);
  }
  const sign = state.down ? -1 : 1;
  if (sort !== "number") {
    const key = values(sort);
    // experts without a value come last in either order
    found.sort((a, b) => {
      const none = missing(key[a]) - missing(key[b]);
      return none || (missing(key[a]) ? 0 : sign * (key[a] - key[b])) || a - b;
    });
  } else if (state.down) {
    found.reverse();
  }
  state.order = found;
  space.style.height = `${found.length * ROW}px`;
  byId("count").textContent =
    found.length === levelOf().experts
      ? `${whole(found.length)} experts`
      : `${whole(found.length)} of ${whole(levelOf().experts)} experts`;
  const heads = byId("heads");
  const column = columnOfList();
  heads.replaceChildren(
    ...["expert", data.classes.length ? "main class" : "", "load", column ? MEASURES[column][0].toLowerCase() : ""].map((text) =>
      make("span", text)
    )
  );
  list.scrollTop = 0;
  drawList();
}

function drawList() {
  const first = Math.max(Math.floor(list.scrollTop / ROW) - 4, 0);
  const last = Math.min(first + Math.ceil(list.clientHeight / ROW) + 8, state.order.length);
  const column = columnOfList();
  const load = values("load");
  const more = column ? values(column) : null;
  while (pool.length < last - first) {
    const row = make("div", undefined, "row option");
    row.setAttribute("role", "option");
    for (let i = 0; i < 4; i++) row.append(make("span"));
    row.addEventListener("click", () => choose(Number(row.dataset.expert)));
    pool.push(row);
    space.append(row);
  }
  let active = "";
  pool.forEach((row, index) => {
    const place = first + index;
    row.hidden = place >= last;
    if (row.hidden) {
      row.removeAttribute("id");
      return;
    }
    const expert = state.order[place];
    const main = mainClass(expert);
    const cells = row.children;
    row.style.top = `${place * ROW}px`;
    row.dataset.expert = expert;
    row.id = `expert-${expert}`;
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-setsize", state.order.length);
    row.setAttribute("aria-selected", expert === state.chosen);
    if (expert === state.chosen) active = row.id;
    cells[0].textContent = expert;
    cells[1].textContent = main < 0 ? "" : className(main);
    cells[2].textContent = percent(load[expert]);
    cells[3].textContent = more ? MEASURES[column][2](more[expert]) : "";
    const shown = [`expert ${expert}`, cells[1].textContent, `load ${cells[2].textContent}`];
    if (more) shown.push(`${MEASURES[column][0]} ${cells[3].textContent}`);
    row.setAttribute("aria-label", shown.filter(Boolean).join(", "));
  });
  if (active) list.setAttribute("aria-activedescendant", active);
  else list.removeAttribute("aria-activedescendant");
}

function reveal() {
  const place = state.order.indexOf(state.chosen);
  if (place < 0) return;
  const top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}

let pending = false;
list.addEventListener("scroll", () => {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    drawList();
  });
});
list.addEventListener("keydown", (event) => {
  const page = Math.max(Math.floor(list.clientHeight / ROW) - 1, 1);
  const end = state.order.length - 1;
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") {
    byId("card").focus();
    event.preventDefault();
  }
  if (!(event.key in steps) || end < 0) return;
  event.preventDefault();
  const place = state.order.indexOf(state.chosen);
  const next = place < 0 ? 0 : Math.min(Math.max(place + steps[event.key], 0), end);
  choose(state.order[next]);
});
