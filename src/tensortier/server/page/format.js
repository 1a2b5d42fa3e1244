// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** "6.3 GiB", "812 MiB". */
export function bytes(n) {
  let value = n;
  let unit = 0;
  while (Math.abs(value) >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${digits(value)} ${UNITS[unit]}`;
}

/** Three digits, as many as a prediction deserves. */
export function digits(value) {
  if (value >= 100) return value.toFixed(0);
  if (value >= 10) return value.toFixed(1);
  if (value >= 0.1 || value === 0) return value.toFixed(2).replace(/\.?0+$/, "") || "0";
  return value.toPrecision(2);
}

export function seconds(value) {
  if (value >= 5400) return `${(value / 3600).toFixed(1)} h`;
  if (value >= 300) return `${(value / 60).toFixed(1)} min`;
  return value >= 10 ? `${value.toFixed(0)} s` : `${value.toFixed(1)} s`;
}

/** "1.8x as fast", "as fast": how the first compares with the second. */
export function ratio(a, b) {
  const times = a / b;
  if (times >= 1.005) return `${times >= 10 ? times.toFixed(0) : times.toFixed(times < 1.1 ? 2 : 1)}x as fast`;
  return "as fast";
}

/** What a device is called: ggml's name, but for main memory and the drive. */
export function place(device) {
  if (device === "CPU") return "RAM";
  return device === "TIER" ? "drive" : device;
}

/** A name as a run of its own: one that is written from right to left, or that holds marks of direction, does not
    reorder what stands around it. */
export function isolated(name) {
  return /^[\x20-\x7e]*$/.test(name) ? name : `\u2068${name}\u2069`;
}
