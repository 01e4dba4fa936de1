"use strict";
// Data never become markup: every text goes through textContent, every picture through `src`.
(() => {
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

  const state = { level: 0, chosen: 0, order: [], scale: 1, down: true, cell: [0, 0] };
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

  // ---------------------------------------------------------------- list

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

  // ---------------------------------------------------------------- scatter

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

  // ---------------------------------------------------------------- card

  function bars(title, found, expert, unit) {
    const width = found.classes.shape[1];
    const classes = unpack(found.classes);
    const shares = unpack(found.values);
    const table = make("table", undefined, "bars");
    const body = make("tbody");
    table.setAttribute("aria-label", title);
    for (let i = 0; i < width; i++) {
      const share = shares[expert * width + i];
      if (missing(share) || share <= 0) continue;
      const name = make("th", className(classes[expert * width + i]));
      name.scope = "row";
      name.title = name.textContent;
      const cell = make("td", undefined, "full");
      const fill = make("div", undefined, "fill");
      fill.style.width = `${Math.min(100 * share, 100)}%`;
      cell.append(fill);
      const row = make("tr");
      row.append(name, cell, make("td", percent(share)));
      body.append(row);
    }
    const heading = make("h3", title);
    if (!body.children.length) return [heading, make("p", unit, "quiet")];
    table.append(body);
    const cut = width < data.classes.length ? [make("p", `the ${width} largest of ${data.classes.length} classes`, "quiet")] : [];
    return [heading, table, ...cut];
  }

  function drawCard() {
    const expert = state.chosen;
    const level = levelOf();
    const name = data.levels.length > 1 ? `Expert ${expert} of level ${state.level}` : `Expert ${expert}`;
    byId("card-title").textContent = name;
    const figures = measures().map((measure) => {
      const part = make("div");
      const term = make("dt", MEASURES[measure][0]);
      term.title = MEASURES[measure][1];
      part.append(term, make("dd", MEASURES[measure][2](values(measure)[expert])));
      return part;
    });
    byId("figures").replaceChildren(...figures);
    byId("histogram").replaceChildren(
      ...(level.histogram ? bars("Classes, by coefficient", level.histogram, expert, "No input uses this expert.") : [])
    );
    byId("effect").replaceChildren(
      ...(level.effect
        ? bars("Right predictions lost without it", level.effect, expert, "Its absence costs no right prediction.")
        : [])
    );
    drawNear(expert);
    byId("edit").hidden = !level.top.changed;
    drawTop();
  }

  function drawNear(expert) {
    const near = levelOf().near;
    const room = byId("near");
    room.replaceChildren();
    if (!near) return;
    const width = near.numbers.shape[1];
    const chips = make("ul", undefined, "chips");
    for (let i = 0; i < width; i++) {
      const other = unpack(near.numbers)[expert * width + i];
      const button = make("button", `${other} (${unpack(near.cosines)[expert * width + i].toFixed(2)})`);
      button.type = "button";
      button.setAttribute("aria-label", `expert ${other}, cosine ${unpack(near.cosines)[expert * width + i].toFixed(2)}`);
      button.addEventListener("click", () => {
        choose(other);
        byId("card").focus();
      });
      const item = make("li");
      item.append(button);
      chips.append(item);
    }
    room.append(make("h3", "Nearest experts, by the cosine of their matrices"), chips);
  }

  function argmax(numbers, start, count) {
    let best = start;
    for (let i = start + 1; i < start + count; i++) if (numbers[i] > numbers[best]) best = i;
    return best - start;
  }

  // the prediction for an input with the expert scaled, and with all experts as they are
  function predictions(found, expert, slot, input) {
    if (!found.changed || slot >= found.changed.shape[1]) return null;
    const [, slots, scales, classes] = found.changed.shape;
    const changed = unpack(found.changed);
    const logits = unpack(data.logits);
    const start = (expert * slots + slot) * scales * classes;
    const before = argmax(logits, input * classes, classes);
    if (state.scale === 1) return [before, before];
    if (data.linear) {
      const made = new Float64Array(classes);
      for (let i = 0; i < classes; i++) {
        const without = changed[start + i];
        made[i] = without + state.scale * (logits[input * classes + i] - without);
      }
      return [before, argmax(made, 0, classes)];
    }
    const index = data.scales.indexOf(state.scale);
    return [before, argmax(changed, start + index * classes, classes)];
  }

  function contentOf(found, expert, slot, input) {
    const content = data.contents[input];
    if (content.image) {
      const image = make("img");
      image.src = content.image;
      image.alt = `input ${unpack(data.numbers)[input]}`;
      return image;
    }
    if (content.tokens) return tokens(found, content, expert, slot);
    if (content.cells) {
      const table = make("table", undefined, "cells");
      content.cells.forEach((cell, index) => {
        const row = make("tr");
        const head = make("th", data.columns[index] ?? String(index));
        head.scope = "row";
        row.append(head, make("td", cell));
        table.append(row);
      });
      return table;
    }
    if (content.text !== undefined) return make("div", content.text, "words");
    return make("div", `input ${unpack(data.numbers)[input]}`);
  }

  function tokens(found, content, expert, slot) {
    const { marks, values: tops } = found;
    const words = make("div", undefined, "words");
    const width = marks ? marks.shape[2] : 0;
    const most = unpack(tops)[expert * tops.shape[1] + slot];
    content.tokens.forEach((token, index) => {
      const mark = make("mark", token);
      const place = (width - 1) / 2 + content.first + index;
      const value = marks ? unpack(marks)[(expert * marks.shape[1] + slot) * width + place] : 0;
      if (value > 0) {
        mark.style.background = `rgba(var(--mark), ${0.15 + 0.75 * Math.min(value / most, 1)})`;
        mark.title = `coefficient ${value.toPrecision(3)}`;
      }
      if (index === -content.first) mark.className = "here";
      words.append(mark);
    });
    return words;
  }

  function drawTop() {
    const level = levelOf();
    const expert = state.chosen;
    const changes = drawInputs(byId("top"), level.top, expert, "No input uses this expert.");
    byId("affected-part").hidden = !level.affected;
    const none = "No prediction is another one without it.";
    const more = level.affected ? drawInputs(byId("affected"), level.affected, expert, none) : [0, 0];
    const what = state.scale === 0 ? "silenced" : state.scale === 1 ? "unchanged" : `times ${state.scale}`;
    const lost = level.lost
      ? ` Over all inputs, silencing it costs ${whole(values("lost")[expert])} right predictions of ` +
        `${whole(level.correct)} and gains ${whole(unpack(level.gained)[expert])}.`
      : "";
    byId("preview").textContent =
      state.scale === 1
        ? `Expert ${expert} unchanged. Another scale shows what it does to the inputs below.`
        : `Expert ${expert} ${what}: the prediction changes for ${changes[0]} of ${changes[1]} inputs with the largest ` +
          `coefficients, and for ${more[0]} of ${more[1]} that depend on it.${state.scale === 0 ? lost : ""}`;
    byId("scale-value").textContent = `× ${state.scale}`;
    byId("silence").setAttribute("aria-pressed", state.scale === 0);
  }

  // returns how many predictions change, of how many that are known
  function drawInputs(room, found, expert, none) {
    const width = found.places.shape[1];
    const labels = unpack(data.labels);
    const items = [];
    let [shown, changes] = [0, 0];
    let kind = "";
    for (let slot = 0; slot < width; slot++) {
      const input = unpack(found.places)[expert * width + slot];
      if (input < 0) continue;
      kind = Object.keys(data.contents[input])[0];
      const item = make("li");
      item.append(contentOf(found, expert, slot, input));
      const label = labels[input] < 0 ? "" : ` · ${className(labels[input])}`;
      item.append(make("div", `${unpack(found.values)[expert * width + slot].toPrecision(3)}${label}`));
      const predicted = predictions(found, expert, slot, input);
      if (predicted) {
        shown++;
        const [before, after] = predicted;
        const text = before === after ? `predicted ${className(before)}` : `predicted ${className(before)} → ${className(after)}`;
        item.append(make("div", text, "quiet"));
        if (before !== after) {
          changes++;
          item.classList.add("changed");
        }
      }
      item.title = `input ${unpack(data.numbers)[input]}`;
      items.push(item);
    }
    room.classList.toggle("wide", kind === "text" || kind === "tokens");
    room.classList.toggle("cards", kind === "cells");
    room.replaceChildren(...(items.length ? items : [make("li", none)]));
    return [changes, shown];
  }

  function rescale(scale) {
    state.scale = scale;
    byId("scale").value = scale;
    byId("scale-choice").value = scale;
    drawTop();
  }

  byId("scale").addEventListener("input", (event) => rescale(Number(event.target.value)));
  byId("scale-choice").addEventListener("change", (event) => rescale(Number(event.target.value)));
  byId("silence").addEventListener("click", () => rescale(0));
  byId("reset").addEventListener("click", () => rescale(1));

  function choose(expert) {
    state.chosen = expert;
    state.scale = 1;
    byId("scale").value = 1;
    byId("scale-choice").value = 1;
    reveal();
    drawList();
    drawScatter();
    drawCard();
    drawGrid();
  }

  // ---------------------------------------------------------------- grids of two levels

  const grid = byId("grid");
  let shape = { rows: 0, columns: 0, size: 0 };
  const MARGIN = 34;

  function gridAt() {
    return Number(byId("grid-choice").value);
  }

  function drawGrid() {
    if (!data.grids.length) return;
    const packed = data.grids[gridAt()];
    const [rows, columns] = packed.shape;
    const cells = unpack(packed);
    const size = Math.max(Math.min(Math.floor(380 / Math.max(rows, columns)), 26), 2);
    shape = { rows, columns, size };
    const [width, height] = [columns * size + MARGIN, rows * size + MARGIN];
    grid.style.width = `${width}px`;
    grid.style.height = `${height}px`;
    const brush = fitted(grid, width, height);
    const style = getComputedStyle(document.documentElement);
    const dot = style.getPropertyValue("--dot").trim();
    let most = 0;
    for (let i = 0; i < cells.length; i++) most = Math.max(most, cells[i]);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const value = most ? cells[row * columns + column] / most : 0;
        brush.fillStyle = `rgba(${dot}, ${0.05 + 0.95 * value})`;
        brush.fillRect(MARGIN + column * size, MARGIN + row * size, size - (size > 5), size - (size > 5));
      }
    }
    brush.fillStyle = style.getPropertyValue("--quiet").trim();
    brush.font = "11px system-ui, sans-serif";
    brush.fillText(`level ${gridAt() + 1} →`, MARGIN, 12);
    brush.save();
    brush.translate(11, MARGIN);
    brush.rotate(Math.PI / 2);
    brush.fillText(`level ${gridAt()} →`, 0, 0);
    brush.restore();
    brush.textAlign = "center";
    for (const column of [0, columns - 1]) brush.fillText(column, MARGIN + (column + 0.5) * size, MARGIN - 6);
    brush.textAlign = "right";
    for (const row of [0, rows - 1]) brush.fillText(row, MARGIN - 4, MARGIN + (row + 0.5) * size + 4);
    brush.strokeStyle = style.getPropertyValue("--ink").trim();
    brush.lineWidth = 1.5;
    const [row, column] = state.cell;
    brush.strokeRect(MARGIN + column * size, MARGIN + row * size, size, size);
    grid.setAttribute("aria-label", `Load of ${rows} by ${columns} pairs of experts of two levels; ${describe()}`);
    byId("cell").textContent = describe();
  }

  function describe() {
    const [row, column] = state.cell;
    const cells = unpack(data.grids[gridAt()]);
    return `Expert ${row} of level ${gridAt()} with expert ${column} of level ${gridAt() + 1}: ${percent(cells[row * shape.columns + column])}`;
  }

  function openCell() {
    const level = state.level === gridAt() + 1 ? gridAt() + 1 : gridAt();
    if (level !== state.level) changeLevel(level);
    choose(state.cell[level - gridAt()]);
  }

  grid.addEventListener("click", (event) => {
    const frame = grid.getBoundingClientRect();
    const column = Math.floor((event.clientX - frame.left - MARGIN) / shape.size);
    const row = Math.floor((event.clientY - frame.top - MARGIN) / shape.size);
    if (row < 0 || column < 0 || row >= shape.rows || column >= shape.columns) return;
    state.cell = [row, column];
    openCell();
  });
  grid.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter") openCell();
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [row, column] = moves[event.key];
    state.cell = [
      Math.min(Math.max(state.cell[0] + row, 0), shape.rows - 1),
      Math.min(Math.max(state.cell[1] + column, 0), shape.columns - 1),
    ];
    drawGrid();
  });

  // ---------------------------------------------------------------- start

  function changeLevel(level) {
    state.level = level;
    byId("level").value = level;
    const names = measures();
    byId("sort").replaceChildren(...names.map((name) => option(name, MEASURES[name][0].toLowerCase())), option("number", "number"));
    byId("sort").value = "load";
    const heights = names.filter((name) => name !== "load" && name !== "baseline");
    byId("measure").replaceChildren(...heights.map((name) => option(name, MEASURES[name][0])));
    byId("measure").value = heights.includes("excess") ? "excess" : heights[0];
    const sum = levelOf().sum;
    const note = byId("note");
    note.hidden = !data.inputs || Math.abs(sum - 1) < 0.01;
    note.textContent = `The coefficients of an input sum to ${sum.toPrecision(3)} in the mean, not to one.`;
    refilter();
  }

  byId("title").textContent = data.title;
  byId("summary").textContent =
    `${data.levels.map((level) => whole(level.experts)).join(" × ")} experts, ${whole(data.inputs)} inputs` +
    (data.classes.length ? `, ${whole(data.classes.length)} classes` : ", no classes") +
    `; ${whole(data.contents.length)} inputs recorded`;
  data.levels.forEach((level, index) => byId("level").append(option(index, `${index} (${whole(level.experts)} experts)`)));
  byId("level-field").hidden = data.levels.length < 2;
  byId("level").addEventListener("change", (event) => {
    changeLevel(Number(event.target.value));
    choose(state.order[0]);
  });
  byId("scale-choice").append(...[...new Set([...data.scales, 1])].sort((a, b) => a - b).map((scale) => option(scale, `× ${scale}`)));
  byId("scale").hidden = !data.linear;
  byId("scale-choice").hidden = data.linear;
  if (!data.linear) byId("scale-label").htmlFor = "scale-choice";
  data.grids.forEach((_, index) => byId("grid-choice").append(option(index, `${index} × ${index + 1}`)));
  byId("grid-section").hidden = !data.grids.length;
  byId("grid-choice").addEventListener("change", () => {
    state.cell = [0, 0];
    drawGrid();
  });
  byId("search").addEventListener("input", refilter);
  byId("sort").addEventListener("change", refilter);
  byId("order").addEventListener("click", () => {
    state.down = !state.down;
    byId("order").textContent = state.down ? "Largest first" : "Smallest first";
    byId("order").setAttribute("aria-pressed", state.down);
    refilter();
  });
  byId("measure").addEventListener("change", drawScatter);
  window.addEventListener("resize", () => {
    drawScatter();
    drawList();
  });
  byId("caption").textContent = data.classes.length && unpack(data.labels).some((label) => label >= 0) ? "coefficient · class" : "coefficient";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    drawScatter();
    drawGrid();
  });
  changeLevel(0);
  choose(state.order[0]);
  performance.mark("explorer-ready");
})();
