// One expert: its figures, classes, neighbours and inputs.

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
  byId("alone").hidden = together();
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
  const top = drawInputs(byId("top"), level.top, expert, "No input uses this expert.");
  byId("affected-part").hidden = !level.affected;
  const none = "No prediction is another one without it.";
  const affected = level.affected ? drawInputs(byId("affected"), level.affected, expert, none) : [0, 0];
  drawEdits(top, affected);
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
    if (!predicted && edits().size && data.logits) item.append(make("div", "prediction not stored", "quiet"));
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

function choose(expert) {
  state.chosen = expert;
  if (!together()) edits().clear();
  reveal();
  drawList();
  drawScatter();
  drawCard();
  drawGrid();
}
