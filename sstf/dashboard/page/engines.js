// Engines side by side: a table of the last 30 seconds with each engine against the first, and the same over time.

import { NONE, fixed, percent, rate, seconds, shown } from "./format.js";
import { Plot, colour, element } from "./plot.js";

const PERCENTILES = [["p50", "P50"], ["p95", "P95"], ["p99", "P99"]];
const FIGURES = [
  ["accepted length", "accepted_length", fixed(2)],
  ["tokens/s", "tokens_per_second", rate],
  ["requests/s", "requests_per_second", rate],
  ...[["time to first token", "ttft"], ["between tokens", "itl"], ["whole request", "e2e"]].flatMap(([label, name]) =>
    PERCENTILES.map(([key, short]) => [`${label}, ${short}`, `${name}/${key}`, seconds])),
  ["running", "running", fixed(0), false],
  ["waiting", "waiting", fixed(0), false],
  ["KV cache in use", "cache_use", percent, false],
];
const PLOTS = [
  { title: "Accepted length", unit: "tokens a pass, bonus token included", format: fixed(2), names: [["accepted_length", ""]], banded: true },
  { title: "Speed", unit: "tokens/s", format: rate, names: [["tokens_per_second", ""]], zero: true },
  { title: "Requests", unit: "finished a second", format: rate, names: [["requests_per_second", ""]], zero: true },
  { title: "Time to first token", format: seconds, names: latency("ttft"), zero: true },
  { title: "Time between tokens", format: seconds, names: latency("itl"), zero: true },
  { title: "Whole request", format: seconds, names: latency("e2e"), zero: true },
  { title: "Requests in the engine", format: fixed(0), whole: true, names: [["running", "running"], ["waiting", "waiting"]], zero: true },
];

function latency(name) {
  return PERCENTILES.map(([key, label]) => [`${name}/${key}`, label]);
}

export class EnginesView {
  constructor(section) {
    this.head = element("tr");
    this.body = element("tbody");
    this.states = element("div");
    this.plots = element("div", { class: "plots" });
    const table = element("table", {}, element("thead", {}, this.head), this.body);
    section.append(element("article", {}, element("h2", {}, "Engines"), this.states,
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Engines side by side" }, table), this.plots));
    this.curves = PLOTS.map((plot) => ({ ...plot, chart: new Plot(this.plots, plot.title, plot) }));
    this.positions = new Map();
  }

  // engines: [{source, table}], the first the baseline
  draw(engines) {
    this.states.replaceChildren(...engines.map(({ source }) => state(source)));
    this.compare(engines.map(({ source }) => source));
    for (const curve of this.curves) {
      const lines = engines.flatMap(({ source, table }, i) => curve.names.map(([name, label], dash) =>
        ({ label: [engines.length > 1 || !label ? source.name : "", label].filter(Boolean).join(" "), data: table.column(name), colour: colour(i), dash })));
      const bands = !curve.banded ? [] : engines.flatMap(({ source }, i) =>
        source.band ? [{ low: source.band[0], high: source.band[1], colour: colour(i) }] : []);
      curve.chart.draw(lines, bands);
    }
    for (const { source, table } of engines) {
      const names = table.names("acceptance_rate/");
      if (!names.length) continue;
      if (!this.positions.has(source.id)) {
        this.positions.set(source.id, new Plot(this.plots, `Acceptance by position, ${source.name}`, { unit: "of the passes that came there", format: percent, zero: true, top: 1 }));
      }
      this.positions.get(source.id).draw(names.map((name, i) => ({ label: name.split("/")[1], data: table.column(name), colour: colour(i) })));
    }
  }

  compare(sources) {
    const [baseline, ...others] = sources;
    const title = (source, i) => {
      const swatch = element("i");
      swatch.style.borderTopColor = `var(${colour(i)})`;
      return element("th", { scope: "col" }, swatch, source.name);
    };
    this.head.replaceChildren(element("td", {}, "last 30 s"), ...sources.map(title),
      ...others.map((source) => element("th", { scope: "col" }, `${source.name} / ${baseline.name}`)));
    this.body.replaceChildren(...FIGURES.map(([label, name, format, compared = true]) => {
      const base = baseline.latest[name];
      const ratio = (source) => compared && base > 0 ? shown(source.latest[name] / base, (value) => fixed(2)(value) + "×") : NONE;
      return element("tr", {}, element("th", { scope: "row" }, label),
        ...sources.map((source) => element("td", {}, shown(source.latest[name], format))),
        ...others.map((source) => element("td", {}, ratio(source))));
    }));
  }
}

function state(source) {
  const band = source.band
    ? `band ${source.band[0].toFixed(2)} ${source.band[1] === null ? "or more" : `to ${source.band[1].toFixed(2)}`}`
    : source.latest.accepted_length || source.learning < 1 ? `learning its band: ${Math.round(100 * (1 - source.learning))} %` : "";
  const text = [source.engine, source.url, source.reason, source.state === "up" && band,
    source.restarts && `started again ${source.restarts}×`].filter(Boolean).map((part) => ` · ${part}`).join("");
  return element("p", { class: "about" }, element("b", {}, source.name), " ", element("span", { class: `state ${source.state}` }, source.state), text);
}
