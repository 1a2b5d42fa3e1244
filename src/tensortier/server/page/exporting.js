// The plan for other programs, and as a file.

import { $, el } from "./dom.js";
import { copy } from "./chat.js";
import { get } from "./server.js";

export class Exporting {
  /** `withPlan(use)` gives a promise of what `use` makes of the plan that is shown. */
  constructor(withPlan, complain) {
    this.withPlan = withPlan;
    this.complain = complain;
    $("elsewhere").addEventListener("click", () => this.open());
    $("save-plan").addEventListener("click", () => this.save());
    $("target").addEventListener("change", () => this.show());
    $("shell").addEventListener("change", () => this.show());
    $("copy").addEventListener("click", () => copy($("export-text").textContent, (text) => ($("copy-status").textContent = text)));
  }

  async open() {
    $("export-text").textContent = "Making the plan …";
    $("export-dialog").showModal();
    try {
      if (!$("target").options.length) {
        const { targets } = await get("api/targets");
        $("target").append(...targets.map(({ name, text }) => el("option", { value: name, text: `${name}: ${text}` })));
      }
    } catch (error) {
      $("export-text").textContent = error.message;
      return;
    }
    await this.show();
  }

  async show() {
    $("copy-status").textContent = "";
    $("export-lost").replaceChildren();
    $("export-files").replaceChildren();
    try {
      const made = await this.withPlan(({ id }) => get(`api/export/${encodeURIComponent($("target").value)}?plan=${id}&shell=${$("shell").value}`));
      const files = Object.entries(made.files);
      $("export-text").textContent = made.command || files.map(([, content]) => content).join("\n");
      $("export-files").replaceChildren(...files.map(([name, content]) => el("button", { type: "button", text: `Save ${name}`, onclick: () => download(name, content) })));
      $("export-lost").replaceChildren(...made.lost.map((text) => el("li", { text })));
    } catch (error) {
      $("export-text").textContent = error.message;
    }
  }

  async save() {
    try {
      const plan = await this.withPlan(({ id }) => get(`api/plans/${id}`));
      download("plan.json", `${JSON.stringify(plan, null, 2)}\n`);
    } catch (error) {
      this.complain(error.message);
    }
  }
}

function download(name, content) {
  const url = URL.createObjectURL(new Blob([content], { type: "application/octet-stream" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
