// Expert rank against expert span, on logarithmic axes. No series hides another: marks that would
// coincide are moved apart, with a line to where they belong.
import { byId, draw } from "./dom.js";
import { whole } from "./format.js";

const COLOURS = 10;
const TOP = 14, RIGHT = 18, BOTTOM = 44, LEFT = 56;
// corners of the marks, and by how much of the way from one to the next they are turned
const CORNERS = [0, 4, 3, 5, 4, 6, 3];
const TURNS = [0, 0.5, 0, 0, 0, 0, 0.5];

function outline(index, radius) {
  const kind = index % COLOURS;
  const corners = CORNERS[kind];
  if (kind === 7) {
    const [far, near] = [radius, radius / 3].map((size) => size.toFixed(2));
    return `M${-near} ${-far}H${near}V${-near}H${far}V${near}H${near}V${far}H${-near}V${near}H${-far}V${-near}H${-near}Z`;
  }
  if (kind === 9) return `M${-radius / 2} ${-radius}H${radius / 2}V${radius}H${-radius / 2}Z`;
  if (kind === 8) return `M${-radius} ${-radius / 2}H${radius}V${radius / 2}H${-radius}Z`;
  if (!corners) return `M${-radius} 0a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0Z`;
  const points = Array.from({ length: corners }, (_, k) => {
    const angle = (2 * Math.PI * (k + TURNS[kind])) / corners - Math.PI / 2;
    return `${(1.15 * radius * Math.cos(angle)).toFixed(2)} ${(1.15 * radius * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${points.join("L")}Z`;
}

/** The mark of a series, for a table's row. */
export function mark(index) {
  const picture = draw("svg", { class: `mark c${index % COLOURS}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" });
  picture.append(draw("path", { d: outline(index, 5.5), fill: "currentColor" }));
  return picture;
}

/** Draw what is known so far: rows, fronts by name, baselines. */
export function showPlot({ rows, fronts, baselines, cost, selected, rank, pick }) {
  const host = byId("plot");
  const width = Math.max(host.clientWidth, 280);
  const height = Math.round(Math.min(Math.max(0.56 * width, 270), 430));
  const series = rows.map((row, index) => ({ ...row, index })).filter((row) => row.feasible && row.expert_rank);
  const others = baselines.filter((row) => row.expert_rank && row.expert_span);
  const dots = series.flatMap((row) => (fronts[row.name] ?? []).map((point) => ({ ...point, row })));
  const all = [...series, ...others, ...dots];
  if (!all.length) return void host.replaceChildren();
  const x = axis(all.map((each) => each.expert_rank), LEFT, width - RIGHT, 46);
  const y = axis(all.map((each) => each.expert_span), height - BOTTOM, TOP, 30);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "Plot of expert rank against expert span" });
  for (const tick of x.ticks) {
    picture.append(draw("path", { class: "grid", d: `M${x.at(tick)} ${TOP}V${height - BOTTOM}` }));
    picture.append(draw("text", { class: "axis", x: x.at(tick), y: height - BOTTOM + 16, "text-anchor": "middle" }, short(tick)));
  }
  for (const tick of y.ticks) {
    picture.append(draw("path", { class: "grid", d: `M${LEFT} ${y.at(tick)}H${width - RIGHT}` }));
    picture.append(draw("text", { class: "axis", x: LEFT - 6, y: y.at(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  picture.append(draw("text", { class: "axis", x: (LEFT + width - RIGHT) / 2, y: height - 8, "text-anchor": "middle" }, "expert rank"));
  picture.append(draw("text", { class: "axis", transform: `translate(13 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, "expert span"));
  for (const row of series) {
    const front = fronts[row.name] ?? [];
    if (front.length > 1) {
      const line = front.map((each) => `${x.at(each.expert_rank)} ${y.at(each.expert_span)}`).join("L");
      picture.append(draw("path", { class: `c${row.index % COLOURS}`, d: `M${line}`, fill: "none", stroke: "currentColor", "stroke-width": 1.2, "stroke-opacity": 0.7 }));
    }
  }
  for (const { row, ...point } of dots) {
    const dot = draw("g", { class: `dot c${row.index % COLOURS}`, transform: `translate(${x.at(point.expert_rank)} ${y.at(point.expert_span)})`, onclick: () => pick(row.name, point.rank) });
    dot.append(draw("circle", { r: 9, fill: "transparent" }), draw("circle", { r: 2.6, fill: "currentColor" }));
    dot.append(draw("title", {}, `${row.name} ${point.rank}: expert rank ${whole(point.expert_rank)}, span ${whole(point.expert_span)}, ${whole(point.parameters)} parameters`));
    picture.append(dot);
  }
  const placed = [];
  for (const row of others) {
    const [px, py] = [x.at(row.expert_rank), y.at(row.expert_span)];
    picture.append(draw("path", { d: `M${px - 5} ${py - 5}l10 10m0 -10l-10 10`, stroke: "var(--quiet)", "stroke-width": 2 }));
    placed.push([px - 6, py - 6, px + 6, py + 6]);
  }
  const costs = series.map((row) => Math.log(row[cost]));
  const [low, high] = [Math.min(...costs), Math.max(...costs)];
  const marks = series.map((row, k) => ({
    row,
    radius: 6 + (high > low ? (7 * (costs[k] - low)) / (high - low) : 3),
    px: x.at(row.expert_rank),
    py: y.at(row.expert_span),
  }));
  apart(marks, width, height);
  for (const each of marks) placed.push([each.mx - each.radius, each.my - each.radius, each.mx + each.radius, each.my + each.radius]);
  for (const each of marks) if (Math.hypot(each.mx - each.px, each.my - each.py) > 1) picture.append(draw("path", { d: `M${each.px} ${each.py}L${each.mx} ${each.my}`, stroke: "var(--quiet)", "stroke-width": 1 }));
  for (const each of marks) picture.append(chosen(each, selected, pick));
  const names = [...labelled(others).map((row) => [row.name, x.at(row.expert_rank), y.at(row.expert_span), 6]), ...marks.map((each) => [each.row.name, each.mx, each.my, each.radius])];
  for (const name of names) picture.append(label(name, placed, width, height));
  const held = document.activeElement?.dataset?.series;
  host.replaceChildren(picture);
  if (held) host.querySelector(`[data-series="${CSS.escape(held)}"]`)?.focus();
}

/** Baselines at one place share a label. */
function labelled(others) {
  const found = new Map();
  for (const row of others) {
    const key = `${row.expert_rank} ${row.expert_span}`;
    found.set(key, found.has(key) ? { ...row, name: `${found.get(key).name.replace(" MoE", "")}, ${row.name}` } : row);
  }
  return [...found.values()];
}

function chosen({ row, radius, mx, my }, selected, pick) {
  const says = `${row.name}: expert rank ${whole(row.expert_rank)}, expert span ${whole(row.expert_span)}, ${whole(row.parameters)} parameters`;
  const act = () => pick(row.name, null);
  const group = draw("g", {
    class: `c${row.index % COLOURS}${row.name === selected ? " chosen" : ""}`,
    transform: `translate(${mx.toFixed(1)} ${my.toFixed(1)})`,
    role: "button",
    tabindex: 0,
    "aria-label": says,
    "aria-pressed": String(row.name === selected),
    "data-series": row.name,
    onclick: act,
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      act();
    },
  });
  group.append(draw("path", { class: "halo", d: outline(row.index, radius + 3.5) }));
  group.append(draw("path", { d: outline(row.index, radius), fill: "currentColor", "fill-opacity": 0.45, stroke: "currentColor", "stroke-width": 2 }));
  group.append(draw("title", {}, says));
  return group;
}

/** Marks that touch are pushed away from one another, a little at a time. */
function apart(marks, width, height) {
  marks.forEach((each, index) => {
    // equal places get directions of their own
    each.mx = each.px + 0.01 * Math.cos(index);
    each.my = each.py + 0.01 * Math.sin(index);
  });
  for (let turn = 0; turn < 200; turn++) {
    let moved = false;
    for (const one of marks) {
      for (const two of marks) {
        if (one === two) continue;
        const [dx, dy] = [two.mx - one.mx, two.my - one.my];
        const distance = Math.hypot(dx, dy);
        const missing = one.radius + two.radius + 3 - distance;
        if (missing <= 0.1) continue;
        two.mx += (dx / distance) * missing * 0.5;
        two.my += (dy / distance) * missing * 0.5;
        one.mx -= (dx / distance) * missing * 0.5;
        one.my -= (dy / distance) * missing * 0.5;
        moved = true;
      }
    }
    for (const each of marks) {
      each.mx = Math.min(Math.max(each.mx, LEFT + each.radius), width - each.radius - 2);
      each.my = Math.min(Math.max(each.my, each.radius + 2), height - BOTTOM - each.radius);
    }
    if (!moved) return;
  }
}

function label([name, px, py, radius], placed, width, height) {
  const long = 6.7 * name.length;
  const places = [];
  for (const far of [4, 14, 26, 40, 60]) {
    places.push([px + radius + far, py + 4], [px - radius - far - long, py + 4]);
    places.push([px - long / 2, py - radius - far], [px - long / 2, py + radius + far + 9]);
    places.push([px + radius + far, py - radius - far], [px - radius - far - long, py + radius + far + 8]);
    places.push([width - long - 4, py + radius + far + 9], [width - long - 4, py - radius - far]);
  }
  const box = ([left, base]) => [left, base - 11, left + long, base + 3];
  const inside = ([left, top, right, bottom]) => left > LEFT && right < width && top > 0 && bottom < height - BOTTOM;
  const free = (one) => placed.every((two) => one[2] < two[0] || two[2] < one[0] || one[3] < two[1] || two[3] < one[1]);
  const place = places.find((each) => inside(box(each)) && free(box(each))) ?? places.find((each) => inside(box(each))) ?? places[0];
  placed.push(box(place));
  return draw("text", { class: "label", x: place[0].toFixed(1), y: place[1].toFixed(1) }, name);
}

/** A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, those left out that crowd. */
function axis(values, from, to, space) {
  let [low, high] = [Math.min(...values), Math.max(...values)].map(Math.log);
  const room = Math.max(0.07 * (high - low), 0.25);
  [low, high] = [low - room, high + room];
  const at = (value) => Number((from + ((Math.log(value) - low) / (high - low)) * (to - from)).toFixed(1));
  const ticks = [];
  for (const kept of [[1], [1, 5], [1, 2, 5]]) {
    for (let power = 0; power < 16; power++) {
      for (const digit of kept) {
        const tick = digit * 10 ** power;
        const seen = Math.log(tick) >= low && Math.log(tick) <= high && !ticks.includes(tick);
        if (seen && ticks.every((other) => Math.abs(at(other) - at(tick)) >= space)) ticks.push(tick);
      }
    }
  }
  return { at, ticks };
}

const short = (tick) => (tick >= 1e6 ? `${tick / 1e6}M` : tick >= 1e4 ? `${tick / 1e3}k` : whole(tick));
