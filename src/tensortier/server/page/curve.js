// Two curves over the budget: tensor by tensor, and whole layers (or, without a GPU, the file mapped).

import { el, svg } from "./dom.js";
import { bytes, digits } from "./format.js";

const HEIGHT = 260;
const NARROWEST = 320;
const WIDEST = 900;
const EDGE = { left: 46, right: 14, top: 16, bottom: 34 };
const CLIFF = 1.2; // times faster by the last tenth

export function sideNames(curve) {
  return curve.kind === "vram"
    ? { tensors: "tensor by tensor", layers: "whole layers" }
    : { tensors: "chosen weights on the drive", layers: "llama.cpp: the file mapped" };
}

export class CurveView {
  /** `node` gets the drawing; `onPick(step)` is called when somebody clicks into it. */
  constructor(node, legend, onPick) {
    this.node = node;
    this.legend = legend;
    this.onPick = onPick;
    // drawn in the pixels it is shown in, so that text keeps its size
    new ResizeObserver(() => this.curve && this.width !== this.#width() && this.#again()).observe(node);
  }

  #width() {
    return Math.round(Math.min(WIDEST, Math.max(NARROWEST, this.node.clientWidth || 640)));
  }

  #again() {
    const step = this.step;
    this.draw(this.curve, this.speed);
    if (step) this.mark(step);
  }

  /** Draws `curve` for `speed` ("decode", "prefill"); call `mark` after it. */
  draw(curve, speed) {
    this.curve = curve;
    this.speed = speed;
    this.width = this.#width();
    const steps = curve.steps;
    const most = Math.max(...steps.map((s) => s.tensors[speed][0]), ...others(curve, speed).map((p) => p.value));
    const first = curve.kind === "vram" ? 0 : steps[0].budget;
    const last = steps[steps.length - 1].budget;
    const span = Math.max(1, last - first);
    const top = niceAbove(most);
    this.x = (budget) => EDGE.left + ((budget - first) / span) * (this.width - EDGE.left - EDGE.right);
    this.y = (value) => HEIGHT - EDGE.bottom - (value / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    const names = sideNames(curve);
    const drawing = svg("svg", { viewBox: `0 0 ${this.width} ${HEIGHT}`, role: "img", "aria-label": this.#told(names), preserveAspectRatio: "xMidYMid meet" });
    drawing.append(...this.#grid(top, first, last));
    if (!steps[steps.length - 1].fits) drawing.append(...this.#beyond(last));
    const band = steps.map((s) => [this.x(s.budget), this.y(Math.min(top, s.tensors[speed][2]))]);
    const below = steps.map((s) => [this.x(s.budget), this.y(s.tensors[speed][1])]).reverse();
    drawing.append(svg("polygon", { class: "band", points: points([...band, ...below]) }));
    drawing.append(svg("polyline", { class: "line layers", points: points(this.#stairs(speed)) }));
    drawing.append(svg("polyline", { class: "line tensors", points: points(steps.map((s) => [this.x(s.budget), this.y(s.tensors[speed][0])])) }));
    drawing.append(...this.#cliff(speed));
    this.marker = svg("line", { class: "marker", y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
    this.dots = { layers: svg("circle", { class: "dot layers", r: 4.5 }), tensors: svg("circle", { class: "dot tensors", r: 5 }) };
    this.label = svg("text", { class: "marker-text", y: EDGE.top - 4 });
    drawing.append(this.marker, this.dots.layers, this.dots.tensors, this.label);
    drawing.addEventListener("pointerdown", (event) => this.#pick(event));
    drawing.addEventListener("pointermove", (event) => event.buttons && this.#pick(event));
    this.node.replaceChildren(drawing);
    this.drawing = drawing;
    this.legend.replaceChildren(
      el("span", { class: "key line-tensors" }, el("i"), names.tensors),
      el("span", { class: "key line-layers" }, el("i"), names.layers),
      el("span", { class: "key-note muted", text: `tokens/s over ${curve.kind === "vram" ? "VRAM" : "RAM"} for the model` }),
    );
  }

  /** Moves the marker to a step. */
  mark(step) {
    this.step = step;
    const x = this.x(step.budget);
    this.marker.setAttribute("x1", x);
    this.marker.setAttribute("x2", x);
    for (const side of ["layers", "tensors"]) {
      this.dots[side].setAttribute("cx", x);
      this.dots[side].setAttribute("cy", this.y(step[side][this.speed][0]));
    }
    this.label.textContent = `${digits(step.tensors[this.speed][0])} tokens/s`;
    this.label.setAttribute("x", Math.min(Math.max(x, EDGE.left + 36), this.width - EDGE.right - 36));
  }

  #pick(event) {
    const box = this.drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const fitting = this.curve.steps.map((step, i) => [Math.abs(this.x(step.budget) - x), i]).filter(([, i]) => this.curve.steps[i].fits);
    if (fitting.length) this.onPick(fitting.reduce((a, b) => (b[0] < a[0] ? b : a))[1]);
  }

  /** Whole layers go up in steps: one for each. A mapped file does not. */
  #stairs(speed) {
    const found = [];
    let before = null;
    for (const { budget, value } of others(this.curve, speed)) {
      const at = [this.x(budget), this.y(value)];
      if (before && this.curve.kind === "vram") found.push([at[0], before[1]]);
      found.push(at);
      before = at;
    }
    return found;
  }

  #grid(top, first, last) {
    const found = [];
    for (let i = 0; i <= 4; i += 1) {
      const value = (top * i) / 4;
      const y = this.y(value);
      found.push(svg("line", { class: "grid", x1: EDGE.left, x2: this.width - EDGE.right, y1: y, y2: y }));
      found.push(svg("text", { class: "tick y", x: EDGE.left - 6, y: y + 4, "aria-hidden": "true" }, digits(value)));
    }
    const ticks = this.width < 480 ? 2 : 4;
    for (let i = 0; i <= ticks; i += 1) {
      const budget = first + ((last - first) * i) / ticks;
      const kind = i === 0 ? "start" : i === ticks ? "end" : "middle";
      found.push(svg("text", { class: `tick x ${kind}`, x: this.x(budget), y: HEIGHT - EDGE.bottom + 18, "aria-hidden": "true" }, bytes(budget)));
    }
    return found;
  }

  #beyond(last) {
    const x = this.x(this.curve.free);
    const width = Math.max(0, this.x(last) - x);
    return [
      svg("rect", { class: "beyond", x, y: EDGE.top, width, height: HEIGHT - EDGE.top - EDGE.bottom }),
      svg("text", { class: "beyond-text", x: x + width - 4, y: HEIGHT - EDGE.bottom - 8 }, width > 130 ? "more than is free here" : "not here"),
    ];
  }

  #cliff(speed) {
    const found = cliff(this.curve, speed);
    if (!found) return [];
    const [x0, x1, y0, y1] = [this.x(found.from.budget), this.x(found.to.budget), this.y(found.from.value), this.y(found.to.value)];
    return [
      svg("path", { class: "cliff", d: `M${x0} ${y0}H${x1}V${y1}` }),
      svg("text", { class: "cliff-text end", x: x1 - 6, y: Math.min(HEIGHT - EDGE.bottom - 6, y0 + 15) }, `the last tenth: ${digits(found.times)}x`),
    ];
  }

  #told(names) {
    const speed = this.speed;
    const steps = this.curve.steps;
    const [a, b] = [steps[0], steps[steps.length - 1]];
    const from = `from ${bytes(a.budget)} to ${bytes(b.budget)}`;
    const side = (key) => `${names[key]} ${digits(a[key][speed][0])} to ${digits(b[key][speed][0])} tokens/s`;
    const found = cliff(this.curve, speed);
    const jump = found ? `; the last tenth makes ${names.layers} ${digits(found.times)} times as fast` : "";
    return `Speed over memory ${from}: ${side("tensors")}; ${side("layers")}${jump}`;
  }
}

/** Points of the curve that ours is compared with. */
function others(curve, speed) {
  if (curve.stairs.length) return curve.stairs.map((s) => ({ budget: s.budget, value: s[speed][0] }));
  return curve.steps.map((s) => ({ budget: s.budget, value: s.layers[speed][0] }));
}

/** What the last tenth of the memory brings to whole layers or a mapped file; null where it is little, or not all fits
    on the curve. */
function cliff(curve, speed) {
  const points = others(curve, speed);
  const to = points[points.length - 1];
  if (to.budget < 0.99 * curve.needed) return null;
  const least = points[0].budget;
  const from = points.findLast((p) => p.budget <= to.budget - 0.1 * (to.budget - least)) ?? points[0];
  const times = to.value / from.value;
  return times >= CLIFF ? { from, to, times } : null;
}

/** The same as rows of a table. */
export function table(curve) {
  const names = sideNames(curve);
  const head = ["Memory", `${names.tensors}, writing`, `${names.layers}, writing`, `${names.tensors}, reading`, `${names.layers}, reading`];
  const rows = curve.steps.map((s) => [bytes(s.budget) + (s.fits ? "" : " (not here)"), ...[s.tensors.decode, s.layers.decode, s.tensors.prefill, s.layers.prefill].map((v) => digits(v[0]))]);
  return el(
    "table",
    {},
    el("caption", { class: "hidden", text: "Predicted tokens/s for each budget" }),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
    el("tbody", {}, ...rows.map(([first, ...rest]) => el("tr", {}, el("th", { scope: "row", text: first }), ...rest.map((text) => el("td", { text }))))),
  );
}

function points(found) {
  return found.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
}

function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= value * 1.04) ?? 12 * power;
}
