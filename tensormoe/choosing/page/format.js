// Figures in words.

export const whole = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));

function scaled(value, base, units) {
  let index = 0;
  while (value >= base && index < units.length - 1) {
    value /= base;
    index++;
  }
  const digits = index === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)}${units[index]}`;
}

export const count = (value) => scaled(value, 1000, ["", "k", "M", "G", "T", "P"]);
export const bytes = (value) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]);

export function seconds(value) {
  if (value >= 1) return `${value.toPrecision(3)} s`;
  return value >= 1e-3 ? `${(1e3 * value).toPrecision(3)} ms` : `${(1e6 * value).toPrecision(3)} µs`;
}

export const quantity = { parameters: count, flops: count, memory: bytes, time: seconds };

export function rank(value) {
  if (value === null || value === undefined) return "–";
  return Array.isArray(value) ? value.join(",") : String(value);
}

export const levels = (experts) => experts.join("x");
