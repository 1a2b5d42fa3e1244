// The figures of one position of the slider, and a bar for each memory.

import { el, setList, setText } from "./dom.js";
import { bytes, digits, place, ratio, seconds } from "./format.js";

const PARTS = ["weights", "KV cache", "computing"];
const ORDER = ["part-0", "kept", "part-1", "part-2", "process"];

function speed([middle, low, high]) {
  return [el("b", { text: digits(middle) }), ` tokens/s `, el("span", { class: "range", text: `${digits(low)} to ${digits(high)}` })];
}

/** `dl` gets the predicted speeds of `step`, and how whole layers compare. */
export function showFigures(dl, curve, step) {
  const { tensors, layers } = step;
  const other = curve.kind === "vram" ? "Whole layers instead" : "Mapped file instead";
  const rows = [
    ["Writes", speed(tensors.decode), "big"],
    ["Reads the prompt", speed(tensors.prefill), "big"],
    ["One answer", [el("b", { text: seconds(tensors.seconds) })], "big"],
  ];
  const times = tensors.decode[0] / layers.decode[0];
  rows.push([
    other,
    [el("b", { text: digits(layers.decode[0]) }), " tokens/s", times >= 1.005 ? el("span", { class: "range", text: `this is ${ratio(tensors.decode[0], layers.decode[0])}` }) : null].filter(Boolean),
    "big",
  ]);
  setList(dl, rows);
}

/** Rows of memory as the bars show them: one bar for each GPU, one for RAM with all that is in it, one for the drive. */
function grouped(curve, rows, drive) {
  const bars = curve.devices.map((device, i) => ({ ...device, kind: device.name === "CPU" ? "ram" : `gpu${i % 4}`, parts: [] }));
  const ram = bars.find((bar) => bar.name === "CPU");
  for (const [name, ...sizes] of rows) {
    const own = bars.find((bar) => bar.name === name) ?? ram;
    if (name === "TIER") own.parts.push(["kept from the drive", sizes[0] + sizes[1] + sizes[2], "kept"]);
    else if (name === "process") own.parts.push(["the program itself", sizes[0], "process"]);
    else sizes.forEach((size, i) => own.parts.push([PARTS[i], size, `part-${i}`]));
  }
  for (const bar of bars) bar.parts = bar.parts.filter(([, size]) => size > 0).sort((a, b) => ORDER.indexOf(a[2]) - ORDER.indexOf(b[2]));
  if (drive > 0) bars.push({ name: "TIER", kind: "drive", label: "read as needed", total: 0, free: 0, parts: [["weights", drive, "part-0"]] });
  return bars;
}

/** The most that any position of the slider takes of each memory. */
function most(curve) {
  const found = new Map();
  for (const step of curve.steps.filter((s) => s.fits)) {
    for (const bar of grouped(curve, step.tensors.memory, step.tensors.drive)) {
      const used = bar.parts.reduce((sum, [, size]) => sum + size, 0);
      found.set(bar.name, Math.max(found.get(bar.name) ?? 0, used));
    }
  }
  return found;
}

export class Bars {
  constructor(node) {
    this.node = node;
    this.rows = new Map();
  }

  /** Shows `memory` rows of a step or plan of `curve`, with `drive` bytes of weights that no memory holds. */
  show(curve, memory, drive) {
    const bars = grouped(curve, memory, drive);
    if (this.curve !== curve) {
      this.curve = curve;
      this.most = most(curve);
    }
    const names = new Set(bars.map((bar) => bar.name));
    for (const [name, row] of this.rows) {
      if (!names.has(name)) {
        row.node.remove();
        this.rows.delete(name);
      }
    }
    for (const bar of bars) {
      if (!this.rows.has(bar.name)) this.rows.set(bar.name, this.#make(bar));
      this.#update(this.rows.get(bar.name), bar);
      this.node.append(this.rows.get(bar.name).node);
    }
  }

  #make(bar) {
    const row = {
      name: el("span", { class: "bar-name" }),
      text: el("span", { class: "bar-text" }),
      track: el("div", { class: "bar-track", role: "img" }),
      list: el("div", { class: "bar-parts" }),
      parts: new Map(),
    };
    row.others = el("span", { class: "bar-part others" }); // what other programs hold
    row.track.append(row.others);
    row.node = el("div", { class: `bar ${bar.kind}` }, el("div", { class: "bar-head" }, row.name, row.text), row.track, row.list);
    return row;
  }

  #update(row, bar) {
    const used = bar.parts.reduce((sum, [, size]) => sum + size, 0);
    // a small model in a large memory would be a sliver: no longer than the slider can make it
    const whole = Math.min(bar.total || bar.free || Infinity, Math.max(used, this.most.get(bar.name) ?? 0) * 1.08) || 1;
    const all = bar.total && whole >= bar.total;
    setText(row.name, bar.name === "CPU" ? "RAM" : bar.name === "TIER" ? "Drive" : `${bar.name} · ${bar.label}`);
    setText(row.text, bar.name === "TIER" ? `${bytes(used)} read as needed` : `${bytes(used)} of ${bytes(bar.free)} free`);
    const told = bar.parts.map(([what, size]) => `${what} ${bytes(size)}`).join(", ");
    row.track.setAttribute("aria-label", `${place(bar.name)}: ${told || "nothing"}`);
    row.track.title = told;
    row.track.classList.toggle("over", bar.name !== "TIER" && used > bar.free * 1.001);
    const seen = new Set();
    for (const [what, size, kind] of bar.parts) {
      seen.add(what);
      let part = row.parts.get(what);
      if (!part) {
        part = el("span", { class: `bar-part ${kind}` });
        row.parts.set(what, part);
        const later = [...row.track.children].find((other) => ORDER.indexOf(other.kind) > ORDER.indexOf(kind));
        part.kind = kind;
        row.track.insertBefore(part, later ?? row.others);
      }
      part.style.width = `${Math.min(100, (100 * size) / whole)}%`;
    }
    for (const [what, part] of row.parts) if (!seen.has(what)) part.style.width = "0";
    row.others.style.width = all ? `${(100 * Math.max(0, whole - bar.free)) / whole}%` : "0";
    row.list.replaceChildren(...bar.parts.map(([what, size, kind]) => el("span", {}, el("i", { class: `bar-part ${kind}` }), `${what} ${bytes(size)}`)));
  }
}
