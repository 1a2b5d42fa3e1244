// The page: what is chosen, what the server tells, and which part shows it.

import { Bars, showFigures } from "./bars.js";
import { Chat } from "./chat.js";
import { CurveView, table } from "./curve.js";
import { $, el, enable, enabled, setList, setText } from "./dom.js";
import { Exporting } from "./exporting.js";
import { Finding } from "./finding.js";
import { bytes, digits, isolated } from "./format.js";
import { figures, Loaded } from "./loaded.js";
import { TensorMap } from "./map.js";
import { get, onKeyNeeded, post, stream } from "./server.js";

const CONTEXTS = [2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144];
const RETRY_MS = 1500; // before a stream of events that ended is asked for again

const page = {
  models: [],
  machine: null,
  served: null, // the model that the server is told to serve
  curve: null,
  step: 0,
  speed: "decode",
  plans: new Map(), // step -> promise of its plan
  asking: null, // the AbortController of the curve under way
  loaded: [], // as the server tells
  lost: false, // it does not tell any more
  measuring: false,
  applying: false, // a plan is being made, to be loaded then
  applied: null, // {id, curve, step} of the plan that was applied here
};

const bars = new Bars($("bars"));
const map = new TensorMap($("map"), $("map-legend"), $("map-reason"));
const curveView = new CurveView($("curve"), $("curve-legend"), (step) => {
  $("budget").value = step;
  moveTo(step);
});
const chat = new Chat(() => ready()?.model ?? ($("model").disabled ? null : $("model").value));
const finding = new Finding(onDownloaded, useModel, choice);
const loaded = new Loaded($("loaded"), (text) => complain(text, "loading"), () => $("model").focus());
new Exporting(withPlan, complain);

// --- what is chosen

function choice() {
  const asked = { model: $("model").value };
  if ($("context").value) asked.context = Number($("context").value);
  if ($("kv").value) asked.kv = $("kv").value;
  if ($("workload").value) asked.workload = $("workload").value;
  return asked;
}

async function loadModels(select) {
  const found = await get("api/models");
  page.models = found.models;
  page.served = found.served;
  $("find").hidden = !found.downloads;
  const list = $("model");
  const wanted = select ?? (list.disabled ? found.served : list.value);
  list.replaceChildren(...page.models.map((m) => el("option", { value: m.id, disabled: Boolean(m.error), text: m.error ? `${isolated(m.id)}: ${m.error}` : `${isolated(m.id)} (${[m.quantization, bytes(m.size)].join(", ")})` })));
  const known = page.models.find((m) => m.id === wanted && !m.error) ?? page.models.find((m) => !m.error);
  list.disabled = !known;
  if (known) list.value = known.id;
  else list.replaceChildren(el("option", { text: "No model on this machine yet" }));
}

/** The model with this path. The server looks at its folders every few seconds only, so a new one may take a moment. */
async function listed(path) {
  for (let attempt = 0; attempt < 6; attempt += 1) {
    if (attempt) await new Promise((resolve) => setTimeout(resolve, 700));
    await loadModels();
    const model = page.models.find((m) => m.path === path);
    if (model) return model;
  }
  throw new Error(`The server does not list ${path}.`);
}

function onDownloaded(download) {
  listed(download.path).catch((error) => complain(error.message));
}

async function useModel(path) {
  let model;
  try {
    model = await listed(path);
  } catch (error) {
    complain(error.message);
    return;
  }
  $("find-dialog").close();
  $("model").value = model.id;
  page.applied = null;
  await askForCurve();
}

function showMachine(machine) {
  page.machine = machine;
  const gpus = machine.gpus.map((g) => `${g.description || g.name} with ${bytes(g.total)}`);
  const parts = [machine.cpu, `${bytes(machine.ram_total)} of RAM`, ...(gpus.length ? gpus : ["no GPU"])];
  setText($("machine"), parts.join(" · "));
  const workload = $("workload");
  const told = { chat: "chat", code: "code", "long-document": "long documents", agent: "agents" };
  const before = workload.value;
  workload.replaceChildren(...Object.entries(machine.workloads).map(([name, w]) => el("option", { value: name, title: `${w.prompt} tokens of prompt and ${w.output} of answer after ${w.depth}`, text: told[name] ?? name })));
  if (before in machine.workloads) workload.value = before;
  setText($("measure-seconds"), String(machine.measure_seconds));
  complain(machine.warnings, "machine");
}

function offerContexts(model) {
  const list = $("context");
  const before = list.value;
  const lengths = CONTEXTS.filter((n) => !model.context_length || n <= model.context_length);
  if (model.context_length && !lengths.includes(model.context_length)) lengths.push(model.context_length);
  list.replaceChildren(el("option", { value: "", text: "as needed" }), ...lengths.map((n) => el("option", { value: n, text: n.toLocaleString("en") })));
  if (lengths.includes(Number(before))) list.value = before;
}

// --- the curve

async function askForCurve() {
  page.asking?.abort();
  const asking = (page.asking = new AbortController());
  $("slider").classList.add("stale");
  $("slider").setAttribute("aria-busy", "true");
  complain("");
  setText($("working"), "Working out what this model does with every budget …");
  $("working").hidden = page.curve !== null;
  try {
    const curve = await post("api/slider", choice(), { signal: asking.signal });
    if (asking === page.asking) showCurve(curve);
  } catch (error) {
    if (error.name === "AbortError") return;
    page.curve = null;
    for (const id of ["slider", "apply-row", "why", "curve-section", "map-section", "measure"]) $(id).hidden = true;
    complain(error.message);
  } finally {
    if (asking === page.asking) {
      $("working").hidden = true;
      $("slider").classList.remove("stale");
      $("slider").removeAttribute("aria-busy");
    }
  }
}

function showCurve(curve) {
  const changed = page.curve?.model.id !== curve.model.id || page.curve?.tensors.length !== curve.tensors.length;
  page.curve = curve;
  page.plans = new Map();
  offerContexts(curve.model);
  const there = curve.steps.length > 0;
  $("measure").hidden = curve.measured;
  $("apply-row").hidden = false;
  $("why").hidden = false;
  for (const id of ["slider", "curve-section", "map-section"]) $(id).hidden = !there;
  if (!there) {
    showWhy(curve.reasons, curve.warnings);
    showLoads();
    return;
  }
  const fitting = curve.steps.filter((s) => s.fits).length;
  page.step = Math.max(0, fitting - 1);
  const slider = $("budget");
  slider.max = page.step;
  slider.disabled = page.step < 1;
  slider.value = page.step;
  const kind = curve.kind === "vram" ? "VRAM" : "RAM";
  setText($("budget-label"), `${kind} for the model`);
  setText($("budget-least"), bytes(curve.steps[0].budget));
  setText($("budget-most"), `${bytes(curve.steps[page.step].budget)}${curve.needed <= curve.free ? ", all of it" : `, all that is free; ${bytes(curve.needed)} would hold all`}`);
  if (changed || !map.tensors) map.build(curve);
  curveView.draw(curve, page.speed);
  drawTable();
  moveTo(page.step);
}

/** Everything that follows the slider. Nothing is asked of the server here. */
function moveTo(index) {
  page.step = Number(index);
  const { curve } = page;
  const step = curve.steps[page.step];
  const text = `${bytes(step.budget)} of ${curve.kind === "vram" ? "VRAM" : "RAM"}`;
  setText($("budget-text"), bytes(step.budget));
  $("budget").setAttribute("aria-valuetext", `${text}, ${digits(step.tensors.decode[0])} tokens per second`);
  showFigures($("figures"), curve, step);
  bars.show(curve, step.tensors.memory, step.tensors.drive);
  map.show(curve, step.tensors.places, step.tensors.map);
  curveView.mark(step);
  showWhy(page.step === Number($("budget").max) ? curve.reasons : [], page.step === Number($("budget").max) ? curve.warnings : []);
  showLoads();
}

function drawTable() {
  const details = $("curve-table");
  if (details.open && page.curve?.steps.length) details.querySelector(".scroll").replaceChildren(table(page.curve));
}

function showWhy(reasons, warnings) {
  const node = $("why-text");
  if (!reasons.length && !warnings.length) {
    node.replaceChildren(el("button", { type: "button", text: "Plan it exactly", onclick: explain }));
    return;
  }
  const list = (rows, kind) => (rows.length ? el("ul", { class: kind }, ...rows.map((text) => el("li", { text }))) : null);
  node.replaceChildren(...[list(reasons, "reasons"), list(warnings, "warnings")].filter(Boolean));
}

async function explain() {
  setText($("why-text"), "Planning …");
  const step = page.step;
  try {
    const plan = await planHere();
    if (step === page.step) showWhy(plan.reasons, plan.warnings);
  } catch (error) {
    setText($("why-text"), error.message);
  }
}

/** The exact plan for the slider's position, asked for once. */
function planHere() {
  const { curve, step } = page;
  if (!curve) return Promise.reject(new Error("Choose a model first."));
  if (!page.plans.has(step)) {
    const whole = !curve.steps.length || step === Number($("budget").max);
    const asked = post("api/plan", { ...choice(), budget: whole ? null : curve.steps[step].budget });
    asked.catch(() => page.plans.delete(step));
    page.plans.set(step, asked);
  }
  return page.plans.get(step);
}

/** What `use(plan)` makes of the plan for the slider's position. The server keeps plans for a while only, and none over
    its end: where it does not know this one any more, it is made again. */
async function withPlan(use) {
  const { plans, step } = page;
  const known = plans.has(step);
  const plan = await planHere();
  try {
    return await use(plan);
  } catch (error) {
    if (!known || error.status !== 400 || step !== page.step) throw error;
    plans.delete(step);
    return use(await planHere());
  }
}

// --- loading

function ready() {
  return page.loaded.find((one) => one.phase === "ready") ?? null;
}

async function apply() {
  if (!enabled($("apply"))) return;
  page.applying = true;
  showLoads();
  try {
    const { curve, step } = page;
    complain("", "choice");
    await withPlan(async (plan) => {
      if (step === page.step) showWhy(plan.reasons, plan.warnings);
      page.applied = { id: plan.id, curve, step };
      page.applying = false; // from here on the server tells how far it is
      await post("api/load", { plan: plan.id });
    });
  } catch (error) {
    page.applied = null;
    page.applying = false;
    showLoads();
    complain(error.message);
  }
}

const UNDER_WAY = ["waiting", "planning", "loading"];
const PHASES = { waiting: "waiting", planning: "planning", loading: "loading", unloading: "freeing memory", ready: "ready", failed: "failed" };

function showLoads() {
  const chosen = page.curve?.model.id;
  const now = page.loaded.find((one) => one.phase !== "unloading") ?? page.loaded[0];
  const pill = $("state");
  setText(pill, page.measuring ? "measuring this machine" : now ? `${isolated(now.model)}: ${PHASES[now.phase]}${now.phase === "loading" ? ` ${Math.round(100 * now.fraction)} %` : ""}` : "no model loaded");
  document.title = now?.phase === "ready" ? `${now.model} · tensortier` : "tensortier";
  pill.className = `pill ${page.measuring ? "waiting" : (now?.phase ?? "none")}`;
  const talking = ready() ?? now;
  setText($("chat-model"), talking ? `with ${isolated(talking.model)}` : "");
  loaded.show(page.loaded);
  const mine = page.loaded.find((one) => one.model === chosen && one.phase !== "unloading");
  const busy = page.applying || UNDER_WAY.includes(mine?.phase);
  enable($("apply"), !busy && Boolean(page.curve));
  $("load").hidden = !mine && !page.applying;
  enable($("measure-start"), !page.measuring && !page.loaded.some((one) => UNDER_WAY.includes(one.phase)));
  const bar = $("load-progress");
  bar.hidden = !busy;
  if (page.applying) {
    bar.removeAttribute("value");
    setText($("load-text"), page.measuring ? "waiting for the measurement of this machine …" : "planning …");
    $("load-text").className = "";
    return;
  }
  if (!mine) return;
  if (mine.phase === "loading") bar.value = mine.fraction;
  else bar.removeAttribute("value");
  const ours = page.applied?.id === mine.plan;
  const here = ours && page.applied.curve === page.curve && page.applied.step === page.step;
  const told = {
    waiting: `waiting for ${isolated(mine.waits_for)} …`,
    planning: "planning …",
    loading: `loading, ${Math.round(100 * mine.fraction)} %`,
    ready: here ? "this plan is in use" : ours ? "in use with another position" : "in use, by a plan that was not made here",
    failed: mine.error,
  };
  setText($("load-text"), told[mine.phase] ?? "");
  $("load-text").className = mine.phase === "failed" ? "error" : "";
}

/** The head shows the model that the chat is with; the list of loaded models, where there are several, all of them. */
function showLive(models) {
  const node = $("live");
  const talking = ready()?.model;
  const mine = models.find((m) => m.model === talking) ?? models[0];
  node.hidden = !mine;
  setList(node, mine ? figures(mine) : []);
  loaded.tell(models);
}

// --- words

const said = new Map(); // what it is about -> lines

/** Shows `text`, a line or several, in place of what was said before `about` the same. The machine's lines are no errors. */
function complain(text, about = "choice") {
  said.set(about, [text].flat().filter(Boolean));
  const rows = [...said].flatMap(([key, lines]) => lines.map((line) => el("p", { class: key === "machine" ? "aside" : "notice error", text: line })));
  $("notice").replaceChildren(...rows);
}

// --- events

const HEARD = {
  state: ({ models }) => {
    const planned = page.loaded.some((one) => one.phase === "planning") && !models.some((one) => one.phase === "planning");
    page.loaded = models;
    showLoads();
    // the first plan of a server may have measured the machine
    if (planned && page.curve && !page.curve.measured) askForCurve();
  },
  stats: ({ models }) => showLive(models),
  downloads: ({ downloads }) => {
    finding.show(downloads);
    const running = downloads.filter((d) => d.phase === "downloading" && d.total);
    const [done, total] = ["done", "total"].map((key) => running.reduce((sum, d) => sum + d[key], 0));
    setText($("find"), running.length ? `Downloading, ${Math.floor((100 * done) / total)} %` : "Find more …");
  },
  measuring: ({ fraction, warnings }) => {
    const running = fraction !== null;
    const ended = page.measuring && !running;
    page.measuring = running;
    $("measure-progress").hidden = !running;
    $("measure-progress").value = fraction ?? 0;
    showLoads();
    complain(warnings, "measuring");
    if (ended) askForCurve();
  },
};

async function listen() {
  for (;;) {
    await shown();
    const leaving = new AbortController();
    const look = () => document.hidden && leaving.abort();
    document.addEventListener("visibilitychange", look);
    try {
      for await (const { event, data } of stream("api/events", { signal: leaving.signal })) {
        if (page.lost) await cameBack();
        HEARD[event]?.(JSON.parse(data));
      }
      if (!document.hidden) gone("the server has ended");
    } catch (error) {
      if (error.name !== "AbortError") gone(error.status ? error.message : "the server does not answer");
    }
    document.removeEventListener("visibilitychange", look);
    if (!document.hidden) await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

/** Nothing is known of the server: what it told last is not shown as if it were so. */
function gone(why) {
  page.lost = true;
  page.loaded = [];
  showLoads();
  showLive([]);
  setText($("state"), why);
  $("state").className = "pill failed";
}

/** It is there again, perhaps another one: with other models, and without the plans that were made. */
async function cameBack() {
  page.lost = false;
  page.plans = new Map();
  complain("");
  await beginning();
}

/** Browsers have few connections to one server: a tab that nobody sees leaves them to the others. */
function shown() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
  });
}

// --- begin

function askForKey() {
  const dialog = $("key-dialog");
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    $("key-form").addEventListener("submit", () => resolve($("key").value), { once: true });
  });
}

function wire() {
  onKeyNeeded(askForKey);
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  for (const id of ["model", "context", "kv", "workload"]) {
    $(id).addEventListener("change", () => {
      if (id === "model") page.applied = null;
      askForCurve();
    });
  }
  $("choices").addEventListener("submit", (event) => event.preventDefault());
  $("budget").addEventListener("input", (event) => moveTo(event.target.value));
  $("apply").addEventListener("click", apply);
  $("measure-start").addEventListener("click", () => enabled($("measure-start")) && post("api/measure", {}).catch((error) => complain(error.message)));
  $("curve-table").addEventListener("toggle", drawTable);
  for (const radio of document.querySelectorAll("input[name=speed]")) {
    radio.addEventListener("change", () => {
      page.speed = radio.value;
      curveView.draw(page.curve, page.speed);
      curveView.mark(page.curve.steps[page.step]);
    });
  }
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
}

/** Asks for the machine, the models and the curve of the chosen one, as far as they are not there. */
async function beginning() {
  try {
    const [machine] = await Promise.all([get("api/machine"), loadModels()]);
    showMachine(machine);
    if (!$("model").disabled && page.curve?.model.id !== $("model").value) await askForCurve();
  } catch (error) {
    complain(error.message);
  }
}

wire();
listen();
beginning();
