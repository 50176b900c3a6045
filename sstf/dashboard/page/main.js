// The page: listens to the stream of events, keeps the tables, draws at most once a frame, and takes the keys.

import { EnginesView } from "./engines.js";
import { time } from "./format.js";
import { MachineView } from "./machine.js";
import { element, repaint } from "./plot.js";
import { RunView } from "./runs.js";
import { Table } from "./table.js";

const at = (id) => document.getElementById(id);
const sources = new Map(); // id -> {source, table}
const runs = new Map(); // id -> RunView
let changed = new Set(), alarms = [], log = [], engines = null, machine = null, stream = null, waiting = false;

// ---- the stream ----------------------------------------------------------------------------------------------------

function listen() {
  stream?.close();
  stream = new EventSource(`events?window=${document.querySelector("#windows input:checked").value}`);
  stream.addEventListener("open", () => say("live"));
  stream.addEventListener("error", () => say("lost", "no connection, trying again"));
  stream.addEventListener("state", (event) => take(JSON.parse(event.data)));
}

function say(state, text = state) {
  at("link").className = state;
  at("link").textContent = text;
}

function take(news) {
  for (const { table, ...source } of news.sources) {
    if (!sources.has(source.id)) sources.set(source.id, { source, table: new Table() });
    sources.get(source.id).table.take(table);
    sources.get(source.id).source = source;
    changed.add(source.id);
  }
  ({ alarms, log } = news);
  if (!waiting) requestAnimationFrame(draw); // not called while the page is hidden
  waiting = true;
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function draw() {
  waiting = false;
  const all = [...sources.values()], now = changed;
  changed = new Set();
  for (const { source, table } of all.filter(({ source }) => source.kind === "run" && now.has(source.id))) {
    at("runs").hidden = false;
    if (!runs.has(source.id)) runs.set(source.id, new RunView(at("runs")));
    runs.get(source.id).draw(source, table);
  }
  const served = all.filter(({ source }) => source.kind === "engine");
  if (served.some(({ source }) => now.has(source.id))) {
    at("engines").hidden = false;
    engines ??= new EnginesView(at("engines"));
    engines.draw(served);
  }
  for (const { source, table } of all.filter(({ source }) => source.kind === "machine" && now.has(source.id))) {
    at("machine").hidden = false;
    machine ??= new MachineView(at("machine"), source);
    machine.draw(table);
  }
  drawAlarms();
  document.body.dataset.drawn = String(1 + Number(document.body.dataset.drawn ?? 0));
}

function drawAlarms() {
  const texts = alarms.map((alarm) => `${alarm.source}: ${alarm.text}`);
  if (texts.join("\n") !== at("alarms").dataset.texts) { // said once by a screen reader, not every second
    at("alarms").dataset.texts = texts.join("\n");
    at("alarms").replaceChildren(...texts.map((text) => element("p", {}, text)));
  }
  document.title = (alarms.length ? `(${alarms.length}) ` : "") + "sstf dashboard";
  at("log").hidden = !log.length;
  if (!log.length) return;
  const lines = log.toReversed().map((alarm) => element("li", {}, element("time", {}, time(alarm.time)),
    `${alarm.source}: ${alarm.text}${alarm.active ? "" : " (ended)"}`));
  at("log").replaceChildren(element("h3", {}, "Alarms so far"), element("ol", {}, ...lines));
}

// ---- controls ------------------------------------------------------------------------------------------------------

function dark() {
  return (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  at("theme").textContent = dark() ? "Light" : "Dark";
  repaint();
}

function toggleTheme() {
  theme(dark() ? "light" : "dark");
  localStorage.setItem("theme", document.documentElement.dataset.theme);
}

function togglePause() {
  const paused = at("pause").getAttribute("aria-pressed") !== "true";
  at("pause").setAttribute("aria-pressed", String(paused));
  if (paused) {
    stream.close();
    say("paused");
  } else {
    listen();
  }
}

function choose(index) {
  document.querySelectorAll("#windows input")[index].checked = true;
  at("windows").dispatchEvent(new Event("change"));
}

function go(id) {
  at(id).scrollIntoView();
  at(id).focus({ preventScroll: true });
}

const KEYS = {
  "?": () => at("shortcuts").showModal(),
  t: toggleTheme,
  p: togglePause,
  1: () => choose(0),
  2: () => choose(1),
  3: () => choose(2),
  r: () => go("runs"),
  e: () => go("engines"),
  m: () => go("machine"),
  a: () => go("alarms"),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("shortcuts").open) return;
  KEYS[event.key]?.();
});
at("help").addEventListener("click", KEYS["?"]);
at("theme").addEventListener("click", toggleTheme);
at("pause").addEventListener("click", togglePause);
at("windows").addEventListener("change", () => {
  at("pause").setAttribute("aria-pressed", "false");
  listen();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
theme(localStorage.getItem("theme"));
listen();
