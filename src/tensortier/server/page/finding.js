// Search for models on the hub, and their downloads.

import { $, el, enable, enabled } from "./dom.js";
import { bytes, digits, isolated, seconds } from "./format.js";
import { get, post, remove } from "./server.js";

const OVER = ["done", "failed", "cancelled"];

export class Finding {
  /** `onDone(download)` is called once for each download that is complete, `onUse(path)` when somebody wants such a model;
      `choice()` gives what is chosen of context, KV cache and workload. */
  constructor(onDone, onUse, choice) {
    this.onDone = onDone;
    this.choice = choice;
    this.onUse = onUse;
    this.rows = new Map();
    this.done = new Set();
    this.rates = new Map();
    $("find").addEventListener("click", () => {
      $("find-dialog").showModal();
      $("search").focus();
    });
    $("search-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.search($("search").value);
    });
  }

  async search(words) {
    const status = $("search-status");
    status.textContent = "Searching …";
    $("found").replaceChildren();
    try {
      const { models, room } = await get(`api/search?q=${encodeURIComponent(words)}`);
      this.room = room;
      const usable = models.filter((m) => m.files.length || m.error);
      status.textContent = usable.length ? `${usable.length} found` : "Nothing with GGUF files was found.";
      $("found").replaceChildren(...usable.map((model) => this.#repository(model)));
    } catch (error) {
      status.textContent = error.message;
    }
  }

  #repository(model) {
    const about = [`${model.downloads.toLocaleString("en")} downloads a month`, `${model.likes} likes`];
    if (model.gated) about.push("its terms have to be accepted on the hub first");
    const files = model.files.map((file) => {
      const button = el("button", { type: "button", text: "Download", "aria-label": `Download ${file.label} of ${model.repo}`, onclick: () => this.#start(model.repo, file.name, button) });
      const about = el("p", { class: "forecast", role: "status" });
      const ask = el("button", { type: "button", text: "How fast here?", "aria-label": `How fast ${file.label} of ${model.repo} would be here`, onclick: () => this.#forecast(model, file, ask, about) });
      const size = el("span", { class: "muted", text: file.missing ? `${file.missing} parts are missing` : bytes(file.size) });
      return el("li", {}, el("span", { class: "file", text: isolated(file.label) }), size, ...(file.missing ? [] : [ask, button, about]));
    });
    return el("li", {}, el("details", {}, el("summary", {}, el("b", { text: model.repo }), el("span", { class: "muted", text: ` ${about.join(" · ")}` })), model.error ? el("p", { class: "error", text: model.error }) : el("ul", {}, ...files)));
  }

  /** What a file would do on this machine, from its first bytes: nothing of it is kept. */
  async #forecast({ repo, revision }, file, button, about) {
    if (!enabled(button)) return;
    enable(button, false);
    about.classList.remove("error");
    about.textContent = "Reading the beginning of the file …";
    try {
      const found = await post("api/forecast", { ...this.choice(), repo, revision, model: file.name });
      about.replaceChildren(...told(found, file.size > this.room ? this.room : null));
    } catch (error) {
      about.classList.add("error");
      about.textContent = error.message;
    } finally {
      enable(button, true);
    }
  }

  async #start(repo, file, button) {
    if (!enabled(button)) return false;
    enable(button, false);
    try {
      await post("api/downloads", { repo, file });
      $("search-status").textContent = "The download has begun.";
      return true;
    } catch (error) {
      $("search-status").textContent = error.message;
      return false;
    } finally {
      enable(button, true);
    }
  }

  async #again(download, button) {
    if (await this.#start(download.repo, download.file, button)) await remove(`api/downloads/${download.id}`).catch(() => {});
  }

  /** The downloads as the server tells them. */
  show(downloads) {
    const node = $("downloads");
    for (const download of downloads) {
      let row = this.rows.get(download.id);
      if (!row) {
        row = { bar: el("progress", { max: "1", value: "0", "aria-label": `Download of ${download.file}` }), text: el("span", { class: "muted" }) };
        row.stop = el("button", { type: "button", text: "Stop", "aria-label": `Stop the download of ${download.file}`, onclick: () => remove(`api/downloads/${download.id}`).catch((e) => ($("search-status").textContent = e.message)) });
        row.again = el("button", { type: "button", text: "Go on", "aria-label": `Go on with the download of ${download.file}`, onclick: () => this.#again(download, row.again) });
        row.use = el("button", { type: "button", class: "primary", text: "Use it", onclick: () => this.onUse(row.path) });
        row.node = el("div", { class: "download" }, (row.name = el("b")), row.bar, row.text, row.stop, row.again, row.use);
        this.rows.set(download.id, row);
        node.prepend(row.node);
      }
      row.path = download.path;
      row.name.textContent = download.file || download.repo;
      row.bar.value = download.total ? download.done / download.total : 0;
      row.text.textContent = download.error || `${download.phase}, ${bytes(download.done)} of ${bytes(download.total)}${this.#rate(download)}`;
      row.text.classList.toggle("error", Boolean(download.error));
      row.use.hidden = download.phase !== "done";
      row.stop.hidden = OVER.includes(download.phase);
      row.again.hidden = !["failed", "cancelled"].includes(download.phase);
      if (download.phase === "done" && !this.done.has(download.id)) {
        this.done.add(download.id);
        $("search-status").textContent = `${download.file} is here.`;
        this.onDone(download);
      }
    }
    const gone = new Set(downloads.map((d) => d.id));
    for (const [id, row] of this.rows) {
      if (!gone.has(id)) {
        row.node.remove();
        this.rows.delete(id);
      }
    }
  }

  #rate(download) {
    if (OVER.includes(download.phase)) return "";
    const now = performance.now();
    const before = this.rates.get(download.id);
    if (!before || now - before.at > 1000) {
      const rate = before ? ((download.done - before.done) / (now - before.at)) * 1000 : 0;
      this.rates.set(download.id, { at: now, done: download.done, rate });
    }
    const { rate } = this.rates.get(download.id);
    return rate > 0 ? `, ${digits(rate / 1e6)} MB/s` : "";
  }
}

/** A forecast in words; `room` is what is free on the drive, where that is too little. */
function told({ fits, drive, memory, estimate, context }, room) {
  const held = memory.reduce((sum, [, ...sizes]) => sum + sizes.reduce((a, b) => a + b, 0), 0);
  const where = fits ? `Fits: it takes ${bytes(held)} of memory` : `Larger than memory: ${bytes(drive)} of it are read from the drive as they are needed`;
  const words = [`${where}, with ${context.toLocaleString("en")} tokens of context. `];
  if (estimate) {
    const [middle, low, high] = estimate.decode;
    words.push(el("b", { text: `${digits(middle)} tokens/s` }), ` (${digits(low)} to ${digits(high)}); reads the prompt at ${digits(estimate.prefill[0])}; one answer takes ${seconds(estimate.seconds)}.`);
  } else words.push("How fast it would be is known once this machine was measured.");
  if (room !== null) words.push(" ", el("span", { class: "error", text: `Only ${bytes(room)} are free on the drive.` }));
  return words;
}
