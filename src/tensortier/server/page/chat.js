// The conversation: streamed, stopped, edited, made again. Answers are rendered as Markdown while they come.

import { $, el, setText } from "./dom.js";
import { digits, isolated } from "./format.js";
import { render } from "./markdown.js";
import { streamPost } from "./server.js";

const RENDER_MS = 60; // between renderings of an answer that grows
const KEPT = "tensortier-chat"; // in the tab's storage: a conversation outlives a reload, and ends with the tab
const OPTIONS = ["system", "temperature", "max-tokens"];

export class Chat {
  /** `model()` gives the name of the model to talk to, or null. */
  constructor(model) {
    this.model = model;
    this.messages = []; // {role, content, who, told, node}
    this.running = null; // the AbortController of the answer under way
    this.list = $("messages");
    this.status = $("chat-status");
    $("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("chat-input").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      } else if (event.key === "Escape" && this.running) this.stop();
    });
    $("stop").addEventListener("click", () => {
      this.stop();
      $("chat-input").focus(); // the button goes away
    });
    $("chat-clear").addEventListener("click", () => this.clear());
    this.list.addEventListener("click", (event) => {
      const source = event.target.closest?.("[data-copy]");
      if (source) copy(source.dataset.copy, (text) => shortly(source, text, (said) => this.say(said)));
    });
    this.#restore();
    window.addEventListener("pagehide", () => this.#keep());
    window.addEventListener("beforeunload", () => {
      this.leaving = true; // answers under way are broken off by the browser
      setTimeout(() => (this.leaving = false), 3000); // unless it stays after all
    });
  }

  /** What was said before the page was loaded again. */
  #restore() {
    let kept;
    try {
      kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    } catch {
      kept = null; // not ours
    }
    if (!kept) return;
    for (const id of OPTIONS) $(id).value = kept.options?.[id] ?? $(id).value;
    for (const { role, content, who, told } of kept.messages ?? []) {
      const message = this.#add(role, String(content), String(who));
      if (role === "assistant") {
        show(message);
        this.#controls(message, told ?? "stopped");
      }
    }
  }

  #keep() {
    const messages = this.messages.map(({ role, content, who, told }) => ({ role, content, who, told }));
    const options = Object.fromEntries(OPTIONS.map((id) => [id, $(id).value]));
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ messages, options }));
    } catch {
      sessionStorage.removeItem(KEPT); // more than a tab may store: half a conversation would be another one
    }
  }

  /** Tells what keeps a message from being sent. */
  #problem(text) {
    setText($("chat-problem"), text);
    $("chat-problem").hidden = !text;
  }

  say(text) {
    setText(this.status, text);
  }

  clear() {
    this.stop();
    this.messages = [];
    this.list.replaceChildren($("chat-empty") ?? el("p", { class: "empty", id: "chat-empty", text: "Nothing said yet. What you write stays on this machine." }));
    this.#problem("");
    this.#keep();
    $("chat-input").focus();
  }

  send() {
    const input = $("chat-input");
    const text = input.value.trim();
    if (!text || this.running) return;
    this.#problem(this.model() ? "" : "There is no model to talk to yet: find one above, and apply it.");
    if (!this.model()) return;
    input.value = "";
    if (document.activeElement === $("send")) input.focus(); // the button rests meanwhile
    this.#add("user", text, "You");
    this.#answer();
  }

  stop() {
    this.running?.abort();
  }

  /** Drops everything from message `index` on and answers what is before it again. */
  regenerate(index) {
    if (this.running) return;
    this.#cut(index);
    this.#answer();
    if (this.running) $("stop").focus(); // in place of the button that was cut
  }

  #cut(index) {
    for (const message of this.messages.splice(index)) message.node.remove();
  }

  #add(role, content, who) {
    $("chat-empty")?.remove();
    const message = { role, content, who };
    message.body = el("div", { class: "message-body" });
    message.foot = el("div", { class: "message-foot" });
    message.node = el("article", { class: `message ${role}`, "aria-label": who }, el("h3", { class: "message-who", text: isolated(who) }), message.body, message.foot);
    this.messages.push(message);
    this.list.append(message.node);
    if (role === "user") {
      message.body.textContent = content;
      message.foot.append(el("button", { type: "button", class: "quiet", text: "Edit", onclick: () => this.#edit(message) }));
    }
    this.#scroll(true);
    return message;
  }

  #edit(message) {
    if (this.running || message.body.querySelector("textarea")) return;
    const field = el("textarea", { rows: Math.min(10, message.content.split("\n").length + 1), "aria-label": "Your message" });
    field.value = message.content;
    const leave = () => {
      message.body.textContent = message.content;
      message.foot.querySelector("button").focus();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text || this.running) return;
      message.content = text;
      leave();
      this.regenerate(this.messages.indexOf(message) + 1);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    message.body.replaceChildren(
      field,
      el("div", { class: "actions" }, el("button", { type: "button", class: "primary", text: "Send again", onclick: send }), el("button", { type: "button", text: "Cancel", onclick: leave })),
    );
    field.focus();
  }

  #request() {
    const messages = this.messages.map(({ role, content }) => ({ role, content: role === "assistant" ? visible(content).answer : content }));
    const system = $("system").value.trim();
    if (system) messages.unshift({ role: "system", content: system });
    const request = { model: this.model(), messages, stream: true, stream_options: { include_usage: true } };
    const temperature = $("temperature").valueAsNumber;
    if (Number.isFinite(temperature)) request.temperature = Math.min(2, Math.max(0, temperature));
    const most = $("max-tokens").valueAsNumber;
    if (Number.isFinite(most) && most >= 1) request.max_tokens = Math.floor(most);
    return request;
  }

  async #answer() {
    this.#problem(this.model() ? "" : "There is no model to talk to: load one above.");
    if (!this.model()) return;
    const request = this.#request();
    const message = this.#add("assistant", "", this.model());
    this.#keep();
    message.node.classList.add("running");
    message.node.setAttribute("aria-busy", "true");
    this.#busy(true);
    this.running = new AbortController();
    const began = performance.now();
    let [first, pieces, usage, ended, drawn] = [0, 0, null, null, 0];
    const draw = (now) => {
      drawn = now;
      show(message);
      this.#scroll();
    };
    try {
      for await (const { data } of streamPost("v1/chat/completions", request, this.running.signal)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw Object.assign(new Error(chunk.error.message), { code: chunk.error.code });
        usage = chunk.usage ?? usage;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        ended = choice.finish_reason ?? ended;
        const text = choice.delta?.content;
        if (!text) continue;
        const now = performance.now();
        first ||= now;
        pieces += 1;
        message.content += text;
        if (now - drawn > RENDER_MS) draw(now);
      }
      if (!message.content && !ended) throw new Error("the server ended the answer before it began");
    } catch (error) {
      if (error.name === "AbortError" || this.leaving) ended = "stopped";
      else {
        ended = "failed";
        message.error = reason(error);
      }
    }
    this.running = null;
    draw(performance.now());
    if (document.activeElement === $("stop")) $("chat-input").focus();
    this.#busy(false);
    message.node.classList.remove("running");
    message.node.removeAttribute("aria-busy");
    this.#foot(message, { began, first, pieces, usage, ended });
    this.#scroll();
    this.#keep();
  }

  #foot(message, { began, first, pieces, usage, ended }) {
    const tokens = usage?.completion_tokens ?? pieces;
    const spent = (performance.now() - first) / 1000;
    const told = [];
    if (ended === "stopped") told.push("stopped");
    if (ended === "length") told.push("cut off at the limit");
    if (first) {
      told.push(`${tokens} tokens`);
      if (tokens > 1 && spent > 0) told.push(`${digits((tokens - 1) / spent)} tokens/s`);
      told.push(`first after ${digits((first - began) / 1000)} s`);
    }
    if (ended === "failed") told.unshift("failed");
    message.told = told.join(" · ");
    this.#controls(message, message.told);
    if (message.error) message.body.append(el("p", { class: "error", role: "alert", text: message.error }));
    this.say({ failed: "The answer failed.", stopped: "Stopped." }[ended] ?? "The answer is complete.");
  }

  /** What can be done with an answer, and what is told of it. */
  #controls(message, told) {
    message.told = told;
    const again = el("button", { type: "button", class: "quiet", text: "Regenerate", onclick: () => this.regenerate(this.messages.indexOf(message)) });
    const take = el("button", { type: "button", class: "quiet", text: "Copy" });
    take.addEventListener("click", () => copy(visible(message.content).answer, (text) => shortly(take, text, (said) => this.say(said))));
    message.foot.replaceChildren(again, take, el("span", { class: "muted", text: told }));
  }

  #busy(busy) {
    $("stop").hidden = !busy;
    $("send").disabled = busy;
    if (busy) this.say("The model is answering.");
  }

  #scroll(always = false) {
    const { scrollTop, scrollHeight, clientHeight } = this.list;
    if (always || scrollHeight - scrollTop - clientHeight < 120) this.list.scrollTop = scrollHeight;
  }
}

/** An error of an answer, and what to do about it. */
function reason(error) {
  if (error.code === "context_length_exceeded") return "This conversation is longer than the context that the model was loaded with. Choose a longer context above and apply it, shorten a message, or begin a new chat.";
  return error instanceof TypeError ? "The connection to the server ended in the middle of the answer." : error.message; // as fetch says it
}

/** Shows on a button for a moment what became of it, and says it. */
function shortly(button, text, say) {
  say(text);
  if (text !== "Copied.") return;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

/** What a model thought before it answered, and the answer. */
function visible(content) {
  const match = /^\s*<think>(.*?)(?:<\/think>|$)/s.exec(content);
  return match ? { thought: match[1].trim(), answer: content.slice(match[0].length).trimStart() } : { thought: "", answer: content };
}

function show(message) {
  const { thought, answer } = visible(message.content);
  const open = message.body.querySelector("details.thought")?.open;
  message.body.replaceChildren(render(answer));
  if (thought) message.body.prepend(el("details", { class: "thought", open: open || !answer }, el("summary", { text: "Thoughts" }), render(thought)));
}

/** Text to the clipboard; `say` is told how it went. */
export async function copy(text, say) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyOldWay(text); // browsers give the clipboard to https and this machine only
    say("Copied.");
    return true;
  } catch {
    say("The browser does not allow copying: select the text and copy it yourself.");
    return false;
  }
}

function copyOldWay(text) {
  const field = el("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error("not allowed");
}
