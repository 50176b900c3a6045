// A training run: its head line, its curves by step, and the rows of its evaluation.

import { NONE, duration, fixed, gib, percent, rate, shown, small } from "./format.js";
import { Plot, colour, element } from "./plot.js";

const PLOTS = [
  { title: "Accepted length", unit: "tokens a pass", format: fixed(2), names: { "val/simulated_accepted_length": "simulated", "val/tau_real": "decoding" } },
  { title: "Loss by draft position", format: fixed(2), by: "loss" },
  { title: "Overlap by draft position", unit: "chance that a sampled token is accepted", format: fixed(2), by: "overlap" },
  { title: "Accuracy by draft position", unit: "chance that a greedy token is accepted", format: fixed(2), by: "accuracy" },
  { title: "Speed", unit: "tokens/s since this start", format: rate, names: { tokens_per_second: "all processes" }, zero: true },
  { title: "Memory", unit: "GiB", format: fixed(2), names: { memory_gib: "main process" }, zero: true },
];

const FACTS = [
  ["accepted length", ({ latest, best }) => [shown(latest["val/simulated_accepted_length"], fixed(2)), best ? `best ${best[0].toFixed(2)} at step ${best[1]}` : "at the first validation"]],
  ["step", ({ step, facts }) => [step.toLocaleString("en"), facts.done?.planned_steps ? `of ${facts.done.planned_steps.toLocaleString("en")}` : ""]],
  ["left", ({ latest, state }) => [state === "training" ? shown(latest.eta_seconds, duration) : NONE, ""]],
  ["tokens/s", ({ latest }) => [shown(latest.tokens_per_second, rate), ""]],
  ["memory", ({ latest }) => [shown(latest.memory_gib, gib), ""]],
  ["waiting for data", ({ latest }) => [shown(latest.waiting_share, percent), ""]],
  ["learning rate", ({ latest }) => [shown(latest.lr, small), ""]],
  ["gradient norm", ({ latest }) => [shown(latest.grad_norm, small), ""]],
];

const RESULTS = [
  ["how", (row) => row.arm ?? NONE],
  ["temperature", (row) => row.temperature ?? NONE],
  ["accepted length", (row) => interval(row.accepted_length, row.accepted_length_ci)],
  ["acceptance by position", (row) => positions(row.acceptance_rate ?? [])],
  ["tokens/s", (row) => shown(row.tokens_per_second, fixed(1))],
  ["speedup", (row) => interval(row.speedup, row.speedup_ci)],
  ["", (row) => row.void ? `void: ${row.void}` : ""],
];

const FIRST = 6;

function positions(rates) {
  const texts = rates.slice(0, FIRST).map((value) => shown(value, fixed(2)));
  return texts.join(" ") + (rates.length > FIRST ? ` … (${rates.length})` : "") || NONE;
}

const interval = (value, range) =>
  shown(value, fixed(2)) + (range && range[0] !== range[1] ? ` (${shown(range[0], fixed(2))} to ${shown(range[1], fixed(2))})` : "");

export class RunView {
  constructor(section) {
    this.about = element("p", { class: "about" });
    this.name = element("h2");
    this.facts = element("dl", { class: "facts" });
    this.plots = element("div", { class: "plots" });
    this.results = element("div");
    section.append(element("article", {}, this.name, this.about, this.facts, this.plots, this.results));
    this.curves = PLOTS.map((plot) => ({ ...plot, chart: new Plot(this.plots, plot.title, { ...plot, x: "step" }) }));
  }

  draw(run, table) {
    const { facts } = run;
    this.name.textContent = run.name;
    this.about.replaceChildren(
      element("span", { class: `state ${run.state}` }, run.state),
      [[facts.target, facts.method].filter(Boolean).join(", "), facts.started && `started ${facts.started.replace("T", " ").slice(0, 19)} UTC`,
        facts.starts > 1 && `start ${facts.starts}`, facts.processes > 1 && `${facts.processes} processes`].filter(Boolean).map((text) => ` · ${text}`).join(""));
    const warnings = [
      run.damaged_lines && `${run.damaged_lines} damaged lines in metrics.jsonl were passed over`,
      run.not_finite && `not a finite number: ${run.not_finite}`, run.note];
    for (const text of warnings.filter(Boolean)) this.about.append(" · ", element("span", { class: "warning" }, text));

    const trains = run.state !== "evaluated";
    this.facts.hidden = this.plots.hidden = !trains;
    this.facts.replaceChildren(...FACTS.map(([label, read]) => {
      const [value, note] = read(run);
      return element("div", {}, element("dt", {}, label), element("dd", {}, value, " ", element("small", {}, note)));
    }));
    for (const curve of this.curves) {
      curve.chart.draw(curve.by ? byPosition(table, curve.by) : Object.entries(curve.names).map(([name, label], i) =>
        ({ label, data: table.sparse(name), colour: colour(i), dash: i })));
    }
    if (this.shown !== run.evaluation) this.evaluation(this.shown = run.evaluation);
  }

  evaluation(rows) {
    this.results.replaceChildren();
    if (!rows.length) return;
    const head = element("tr", {}, ...RESULTS.map(([label]) => element("th", { scope: "col" }, label)));
    const body = rows.map((row) => element("tr", {}, ...RESULTS.map(([label, read], i) =>
      i ? element("td", label ? {} : { class: "void" }, String(read(row))) : element("th", { scope: "row" }, String(read(row))))));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    this.results.append(element("h3", {}, "Evaluation"),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Evaluation" }, table));
  }
}

// Training solid, validation dashed; a colour a position.
function byPosition(table, figure) {
  const lines = (set, label, dash) => table.names(`${set}/${figure}/`).map((name, i) =>
    ({ label: `${label}${name.split("/")[2]}`, data: table.sparse(name), colour: colour(i), dash }));
  return [...lines("train", "", 0), ...lines("val", "val ", 1)];
}
