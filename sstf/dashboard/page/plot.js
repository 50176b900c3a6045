// One plot: a caption, a legend with the newest values (or those under the cursor), and uPlot's lines.
/* global uPlot */

import { NONE, shown, time } from "./format.js";

export const DASHES = [[], [6, 4], [2, 3]];
const BORDERS = ["solid", "dashed", "dotted"];
const HEIGHT = 170;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const plots = new Set();

export const colour = (index) => `--c${index % 6}`;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const repaint = () => plots.forEach((plot) => plot.rebuild());

export function element(tag, attributes = {}, ...content) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

export class Plot {
  // x: "time" or "step"; format: of the values; zero: y begins at 0; top: y ends there; whole: y counts things
  constructor(parent, title, { unit = "", x = "time", format, zero = false, top = null, whole = false }) {
    Object.assign(this, { title, x, format, zero, top, whole, lines: [], bands: [], shape: "", chart: null, at: null });
    this.legend = element("ul", { class: "legend" });
    this.box = element("div", { class: "plot", tabindex: "0", role: "img" });
    const caption = element("figcaption", {}, title);
    if (unit) caption.append(" ", element("small", {}, unit));
    this.figure = element("figure", {}, caption, this.legend, this.box);
    parent.append(this.figure);
    this.box.addEventListener("keydown", (event) => this.walk(event));
    this.box.addEventListener("blur", () => this.chart?.setCursor({ left: -10, top: -10 }));
    new ResizeObserver(() => this.chart?.setSize({ width: this.box.clientWidth, height: HEIGHT })).observe(this.box);
    plots.add(this);
  }

  // lines: {label, data: [xs, values], colour, dash}; bands: {low, high, colour}
  draw(lines, bands = []) {
    this.lines = lines.filter((line) => line.data[1].some(Number.isFinite));
    this.bands = bands;
    this.data = this.lines.length ? uPlot.join(this.lines.map((line) => line.data)) : null;
    const shape = JSON.stringify(this.lines.map(({ label, colour, dash }) => [label, colour, dash]));
    if (shape !== this.shape || !this.data || !this.chart) {
      this.shape = shape;
      this.rebuild();
    } else {
      this.chart.setData(this.data);
    }
    this.describe();
  }

  rebuild() {
    this.chart?.destroy();
    this.chart = null;
    this.box.replaceChildren();
    this.marks = this.lines.map((line) => {
      const swatch = element("i"), value = element("b");
      swatch.style.borderTopColor = `var(${line.colour})`;
      swatch.style.borderTopStyle = BORDERS[line.dash ?? 0];
      this.legend.append(element("li", {}, swatch, line.label, value));
      return value;
    });
    this.legend.replaceChildren(...[...this.legend.children].slice(this.legend.children.length - this.lines.length));
    if (!this.data) {
      this.box.append(element("p", { class: "empty" }, "no figures yet"));
      return;
    }
    const axis = { stroke: css("--soft"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    this.chart = new uPlot({
      width: this.box.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false, points: { size: 7 }, sync: { key: this.x } },
      scales: {
        x: { time: false, range: (_, low, high) => this.x === "time" ? [Math.min(low, high - 60), high] : [low, Math.max(high, low + 1)] },
        y: { range: (_, low, high) => this.range(low, high) },
      },
      axes: [
        { ...axis, size: 24, space: 70, values: (_, xs) => xs.map((x) => this.mark(x, xs)) },
        { ...axis, size: 58, space: 30, values: (_, ys) => ys.map(this.format), ...(this.whole && { incrs: WHOLE }) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        stroke: css(line.colour), width: 1.75, dash: DASHES[line.dash ?? 0], spanGaps: false, points: { size: 4, fill: css(line.colour) },
      }))],
      hooks: { drawClear: [(chart) => this.shade(chart)], setCursor: [(chart) => this.read(chart.cursor.idx)] },
    }, this.data, this.box);
    this.read(null);
  }

  // A mark of the x axis; seconds where the marks are less than a minute apart.
  mark(x, xs) {
    return this.x === "step" ? x.toLocaleString("en") : xs.length > 1 && xs[1] - xs[0] < 60 ? time(x) : time(x).slice(0, 5);
  }

  range(low, high) {
    if (low === null) return [0, 1];
    for (const band of this.bands) {
      low = Math.min(low, band.low);
      if (band.high !== null) high = Math.max(high, band.high);
    }
    const pad = Math.max((high - low) * 0.08, Math.abs(high) * 0.005, 1e-9);
    return [this.zero ? 0 : low - pad, this.top ?? (this.zero && high <= 0 ? 1 : high + pad)];
  }

  // The bands in which values are as expected.
  shade(chart) {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const band of this.bands) {
      const bottom = chart.valToPos(band.low, "y", true), top = band.high === null ? bbox.top : chart.valToPos(band.high, "y", true);
      ctx.fillStyle = ctx.strokeStyle = css(band.colour);
      ctx.globalAlpha = 0.1;
      ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
    }
    ctx.restore();
  }

  // Legend values at a row, or each line's newest.
  read(row) {
    this.at = row ?? null;
    this.lines.forEach((line, i) => { this.marks[i].textContent = this.value(i, row); });
  }

  value(i, row) {
    const values = this.data[i + 1];
    if (row !== null && row !== undefined) return shown(values[row], this.format);
    return shown(values.findLast(Number.isFinite), this.format);
  }

  place(row) {
    const x = this.data[0][row];
    return this.x === "time" ? `at ${time(x)}` : `step ${x.toLocaleString("en")}`;
  }

  describe() {
    const values = this.lines.map((line, i) => `${line.label} ${this.value(i, null)}`);
    const where = this.data ? `, ${this.place(this.data[0].length - 1)}` : "";
    this.box.setAttribute("aria-label", `${this.title}: ${values.join(", ") || NONE}${where}`);
    if (this.at === null && this.data) this.read(null);
  }

  walk(event) {
    const last = this.data ? this.data[0].length - 1 : -1, now = this.at ?? last + 1;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(last, to));
    this.chart.setCursor({ left: this.chart.valToPos(this.data[0][row], "x"), top: 10 });
    const values = this.lines.map((line, i) => `${line.label} ${this.value(i, row)}`);
    document.getElementById("spoken").textContent = `${this.place(row)}: ${values.join(", ")}`;
  }
}
