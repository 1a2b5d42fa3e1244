// The models that are loaded: what each holds and does, and a button that frees it.

import { el, setList, setText } from "./dom.js";
import { bytes, digits, isolated } from "./format.js";
import { post } from "./server.js";

/** What a model does now, as rows of a list: [term, value]. */
export function figures(m) {
  const found = [
    ["tokens/s", digits(m.tokens_per_second)],
    ["answers", m.waiting ? `${m.active} + ${m.waiting} waiting` : String(m.active)],
    ["context", `${Math.round((100 * m.context_used) / Math.max(1, m.context))} %`],
  ];
  if (m.drive) {
    found.push(["from RAM", m.drive.hit_rate === null ? "–" : `${Math.round(100 * m.drive.hit_rate)} %`]);
    found.push(["drive", `${digits(m.drive.bytes_per_second / 1e6)} MB/s`]);
  }
  return found;
}

const WORDS = {
  waiting: ["waiting", "Stop"],
  planning: ["planning", "Stop"],
  loading: ["loading", "Stop"],
  ready: ["", "Unload"],
  unloading: ["freeing memory", ""],
  failed: ["failed", "Dismiss"],
};

export class Loaded {
  /** `node` gets a row for each model; `complain(text)` is told what went wrong; `elsewhere()` takes the focus of a row
      that goes. */
  constructor(node, complain, elsewhere) {
    this.elsewhere = elsewhere;
    this.node = node;
    this.complain = complain;
    this.rows = new Map();
  }

  /** The models as the server tells them. Rows stay what they are, so that the focus does. */
  show(models) {
    this.node.hidden = !models.length;
    const told = new Set();
    for (const [i, model] of models.entries()) {
      const key = `${model.model}\n${model.phase === "unloading" ? i : ""}`;
      told.add(key);
      if (!this.rows.has(key)) this.rows.set(key, this.#make(model.model));
      this.#update(this.rows.get(key), model);
    }
    for (const [key, row] of this.rows) {
      if (told.has(key)) continue;
      if (row.node.contains(document.activeElement)) this.elsewhere();
      row.node.remove();
      this.rows.delete(key);
    }
  }

  /** What they do: a list for each, where there is more than one. */
  tell(models) {
    for (const row of this.rows.values()) {
      const mine = models.length > 1 && models.find((m) => m.model === row.name);
      setList(row.live, mine ? figures(mine) : []);
    }
  }

  #make(name) {
    const row = { name, text: el("span", { class: "muted" }), live: el("dl", { class: "live" }), button: el("button", { type: "button", class: "quiet" }) };
    row.button.addEventListener("click", async () => {
      try {
        await post("api/unload", { model: name });
        this.complain("");
      } catch (error) {
        this.complain(error.message);
      }
    });
    row.node = el("li", {}, el("b", { text: isolated(name) }), row.text, row.live, row.button);
    this.node.append(row.node);
    return row;
  }

  #update(row, { model, phase, waits_for, fraction, memory, error }) {
    const [word, action] = WORDS[phase];
    const held = memory.reduce((sum, [device, ...sizes]) => sum + (device === "process" ? 0 : sizes.reduce((a, b) => a + b, 0)), 0);
    const size = held && phase !== "failed" ? `holds ${bytes(held)}` : "";
    const waiting = phase === "waiting" ? `${word} for ${isolated(waits_for)}` : `${word}, waiting for ${isolated(waits_for)}`;
    const loading = phase === "loading" ? `${word}, ${Math.round(100 * fraction)} %` : waits_for ? waiting : word;
    setText(row.text, phase === "failed" ? `${word}: ${error}` : phase === "ready" ? size : loading);
    row.text.classList.toggle("error", phase === "failed");
    if (!action && row.button === document.activeElement) this.elsewhere();
    row.button.hidden = !action;
    setText(row.button, action);
    row.button.setAttribute("aria-label", `${action} ${model}`);
  }
}
