// A cell for each tensor: a column for each layer, a row for each kind. The colour is the place, the reason is told.

import { el, setText } from "./dom.js";
import { bytes, place } from "./format.js";

const CODES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

export class TensorMap {
  constructor(node, legend, reason) {
    this.node = node;
    this.legend = legend;
    this.reason = reason;
    this.hint = reason.textContent;
    node.addEventListener("pointerover", (event) => this.#tell(event.target));
    node.addEventListener("pointerleave", () => this.#tell(this.node.contains(document.activeElement) ? document.activeElement : null));
    node.addEventListener("focusin", (event) => this.#tell(event.target));
    node.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Builds the cells for the tensors of `curve`. */
  build(curve) {
    this.tensors = curve.tensors;
    this.codes = "";
    const layers = curve.model.layers;
    const kinds = new Map(); // name without layer -> cells by layer
    const outside = [];
    this.tensors.forEach(([name, , layer], i) => {
      if (layer === null) outside.push(i);
      else {
        const kind = name.replace(/^blk\.\d+\./, "").replace(/\.weight$/, "");
        if (!kinds.has(kind)) kinds.set(kind, []);
        kinds.get(kind)[layer] = i;
      }
    });
    const rows = [...kinds].map(([kind, found]) => ({ kind, found, role: this.tensors[found.find((i) => i !== undefined)][1] }));
    rows.sort((a, b) => order(a.role) - order(b.role)); // stable: within a role as in the file
    this.cells = new Array(this.tensors.length);
    this.grid = [];
    const template = `minmax(5.5rem, 8.5rem) repeat(${layers}, minmax(5px, 1fr))`;
    const body = rows.map(({ kind, found }) => this.#row(kind, Array.from({ length: layers }, (_, l) => found[l]), template));
    body.push(this.#row("outside the layers", outside, template));
    const grid = el("div", { class: "map-grid", role: "grid", "aria-label": "Tensors by layer", "aria-colcount": layers + 1 }, ...body);
    this.node.replaceChildren(grid);
    const first = this.grid.flat().find((cell) => cell);
    if (first) first.tabIndex = 0;
    setText(this.reason, this.hint);
  }

  #row(kind, indices, template) {
    const cells = indices.map((i) => {
      if (i === undefined) return null;
      return (this.cells[i] = el("span", { role: "gridcell", class: "cell", tabindex: "-1", "data-i": i }));
    });
    this.grid.push(cells);
    const row = el("div", { class: "map-row", role: "row" }, el("span", { role: "rowheader", class: "map-kind", text: kind, title: kind }), ...cells.map((cell) => cell ?? el("span", { class: "gap", role: "presentation" })));
    row.style.gridTemplateColumns = template;
    return row;
  }

  /** Colours the cells by `places` ([device, reason]) and `codes`, of a step or a plan. */
  show(curve, places, codes) {
    const gpus = curve.devices.filter((d) => d.name !== "CPU").map((d) => d.name);
    const kind = (device) => (device === "CPU" ? "ram" : device === "TIER" ? "drive" : `gpu${Math.max(0, gpus.indexOf(device)) % 4}`);
    const sums = new Map();
    for (let i = 0; i < this.tensors.length; i += 1) {
      const [device, reason] = places[CODES.indexOf(codes[i])];
      const cell = this.cells[i];
      sums.set(device, (sums.get(device) ?? 0) + this.tensors[i][3]);
      if (cell.place !== device) {
        cell.place = device;
        cell.className = `cell ${kind(device)}`;
        cell.setAttribute("aria-label", `${this.tensors[i][0]}: ${place(device)}`);
      }
      cell.reason = reason;
    }
    const keys = [...gpus, "CPU", "TIER"].filter((device) => sums.has(device));
    this.legend.replaceChildren(
      ...keys.map((device) => el("span", { class: `key cell-key ${kind(device)}` }, el("i"), `${place(device)} ${bytes(sums.get(device))}`)),
    );
    if (this.told) this.#tell(this.told);
  }

  #tell(target) {
    const cell = target?.closest?.(".cell");
    this.told = cell ?? null;
    if (!cell) {
      setText(this.reason, this.hint);
      return;
    }
    const [name, , , size, type] = this.tensors[Number(cell.dataset.i)];
    this.reason.replaceChildren(el("b", { text: name }), ` · ${type} · ${bytes(size)} · ${place(cell.place)}. ${cell.reason}`);
    if (cell === document.activeElement) cell.setAttribute("aria-label", `${name}: ${place(cell.place)}. ${cell.reason}`);
  }

  #move(event) {
    const cell = event.target.closest?.(".cell");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!cell || (!step && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    let row = this.grid.findIndex((cells) => cells.includes(cell));
    let column = this.grid[row].indexOf(cell);
    let next = null;
    if (event.key === "Home") next = this.grid[row].find((c) => c);
    else if (event.key === "End") next = this.grid[row].findLast((c) => c);
    while (step && !next) {
      row += step[0];
      column += step[1];
      if (row < 0 || row >= this.grid.length || column < 0 || column >= Math.max(...this.grid.map((c) => c.length))) return;
      next = this.grid[row][column] ?? (step[0] ? this.grid[row].findLast((c) => c) : null);
    }
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

// Attention first, then feed-forward, then what is small.
const ORDER = ["attention", "recurrent", "ffn_gate", "ffn_up", "ffn_down", "shared_expert", "expert_gate_up", "expert_gate", "expert_up", "expert_down", "router", "norm", "other"];

function order(role) {
  const at = ORDER.indexOf(role);
  return at < 0 ? ORDER.length : at;
}
