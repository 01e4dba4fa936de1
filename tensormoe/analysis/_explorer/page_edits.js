// Edits of experts, and the predictions that follow from what each expert gives to the logits.

// scales by expert, of the level that is shown
const edits = () => state.edits[state.level];
// several edits add up where logits are linear in every expert, and all parts are stored
const together = () => data.linear && levelOf().parts !== null;

function argmax(numbers, start, count) {
  let best = start;
  for (let i = start + 1; i < start + count; i++) if (numbers[i] > numbers[best]) best = i;
  return best - start;
}

// where each input's parts begin, or -1 for inputs whose parts are not stored
const begins = new Map();
function startsOf(parts) {
  if (!begins.has(parts)) {
    const counts = unpack(parts.counts);
    let next = 0;
    begins.set(
      parts,
      counts.map((count) => {
        const here = next;
        next += Math.max(count, 0);
        return count < 0 ? -1 : here;
      })
    );
  }
  return begins.get(parts);
}

// the prediction for a recorded input with all edits, or -1 where it is not known
const classes = data.logits ? data.logits.shape[1] : 0;
const made = new Float64Array(classes);
function edited(input) {
  const parts = levelOf().parts;
  const start = startsOf(parts)[input];
  if (start < 0) return -1;
  const [experts, given, logits] = [unpack(parts.experts), unpack(parts.logits), unpack(data.logits)];
  for (let i = 0; i < classes; i++) made[i] = logits[input * classes + i];
  const end = start + unpack(parts.counts)[input];
  for (let place = start; place < end; place++) {
    const scale = edits().get(experts[place]);
    if (scale === undefined) continue;
    for (let i = 0; i < classes; i++) made[i] += (scale - 1) * given[place * classes + i];
  }
  return argmax(made, 0, classes);
}

// the prediction for an input of an expert with all edits, and with all experts as they are
function predictions(found, expert, slot, input) {
  if (!found.changed) return null;
  const before = argmax(unpack(data.logits), input * classes, classes);
  if (!edits().size) return slot < found.changed.shape[1] ? [before, before] : null;
  const after = together() ? edited(input) : -1;
  if (after >= 0) return [before, after];
  const alone = edits().size === 1 && edits().has(expert) && slot < found.changed.shape[1];
  return alone ? [before, scaledAlone(found, expert, slot, input)] : null;
}

// from the run of the model with this expert scaled
function scaledAlone(found, expert, slot, input) {
  const [, slots, scales] = found.changed.shape;
  const changed = unpack(found.changed);
  const start = (expert * slots + slot) * scales * classes;
  const scale = edits().get(expert);
  if (!data.linear) return argmax(changed, start + data.scales.indexOf(scale) * classes, classes);
  const logits = unpack(data.logits);
  for (let i = 0; i < classes; i++) {
    const without = changed[start + i];
    made[i] = without + scale * (logits[input * classes + i] - without);
  }
  return argmax(made, 0, classes);
}

// how predictions of all recorded inputs change, in words
function overall() {
  const labels = unpack(data.labels);
  const logits = unpack(data.logits);
  let [known, moved, labelled, right, still] = [0, 0, 0, 0, 0];
  for (let input = 0; input < labels.length; input++) {
    const after = edited(input);
    if (after < 0) continue;
    const before = argmax(logits, input * classes, classes);
    known++;
    moved += after !== before;
    if (labels[input] < 0) continue;
    labelled++;
    right += before === labels[input];
    still += after === labels[input];
  }
  const answers = labelled ? ` Of these, ${whole(right)} were right and ${whole(still)} are.` : "";
  return ` Of all ${whole(known)} inputs that are stored it changes for ${whole(moved)}.${answers}`;
}

function sentence([changedTop, top], [changedAffected, affected]) {
  const expert = state.chosen;
  const few = [...edits()].slice(0, 6).map(([each, scale]) => `expert ${each} × ${scale}`);
  if (!few.length) return `Expert ${expert} unchanged. Another scale shows what it does to the inputs below.`;
  if (edits().size > few.length) few.push("…");
  const what = few.join(", ");
  const here =
    `${what[0].toUpperCase()}${what.slice(1)}: the prediction changes for ${changedTop} of ${top} inputs with the ` +
    `largest coefficients of expert ${expert}, and for ${changedAffected} of ${affected} that depend on it.`;
  const alone = edits().size === 1 && edits().get(expert) === 0 && levelOf().lost;
  const lost = alone
    ? ` Over all inputs, silencing it costs ${whole(values("lost")[expert])} right predictions of ` +
      `${whole(levelOf().correct)} and gains ${whole(unpack(levelOf().gained)[expert])}.`
    : "";
  return here + (together() ? overall() : "") + lost;
}

function drawEdits(top, affected) {
  const scale = edits().get(state.chosen) ?? 1;
  byId("scale").value = scale;
  byId("scale-choice").value = scale;
  byId("scale-value").textContent = `× ${scale}`;
  byId("silence").setAttribute("aria-pressed", scale === 0);
  byId("preview").textContent = sentence(top, affected);
  byId("edits-part").hidden = !edits().size;
  byId("edits").replaceChildren(
    ...[...edits()].map(([expert, each]) => {
      const item = make("li");
      const open = make("button", `${expert} × ${each}`);
      open.type = "button";
      open.setAttribute("aria-label", `expert ${expert}, times ${each}`);
      open.addEventListener("click", () => choose(expert));
      const remove = make("button", "✕");
      remove.type = "button";
      remove.setAttribute("aria-label", `remove the edit of expert ${expert}`);
      remove.addEventListener("click", () => {
        edits().delete(expert);
        drawTop();
        (byId("edits").querySelector("button") ?? byId("silence")).focus();
      });
      item.append(open, remove);
      return item;
    })
  );
}

function rescale(scale) {
  if (!together()) edits().clear();
  if (scale === 1) edits().delete(state.chosen);
  else edits().set(state.chosen, scale);
  drawTop();
}

byId("scale").addEventListener("input", (event) => rescale(Number(event.target.value)));
byId("scale-choice").addEventListener("change", (event) => rescale(Number(event.target.value)));
byId("silence").addEventListener("click", () => rescale(0));
byId("reset").addEventListener("click", () => rescale(1));
byId("reset-all").addEventListener("click", () => {
  edits().clear();
  drawTop();
  byId("silence").focus();
});
