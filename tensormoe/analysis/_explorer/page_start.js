// What is shown first.

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
