// Loads of pairs of experts of two levels.

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
