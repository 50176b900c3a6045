// Processor, memory and GPUs of the machine that the page comes from.

import { percent } from "./format.js";
import { Plot, colour, element } from "./plot.js";

const SHARE = { format: percent, zero: true, top: 1 };

export class MachineView {
  constructor(section, source) {
    const plots = element("div", { class: "plots" });
    this.about = element("p", { class: "about" });
    section.append(element("article", {}, element("h2", {}, "This machine"), this.about, plots));
    this.about.textContent = [`${source.cores} cores`, `${source.memory_gib} GiB`, ...source.gpus].join(" · ");
    this.use = new Plot(plots, "Processor and memory", { ...SHARE, unit: "in use" });
    this.gpus = source.gpus.map((name, i) => new Plot(plots, `GPU ${i}`, { ...SHARE, unit: name }));
  }

  draw(table) {
    const lines = (names) => names.map(([name, label], i) => ({ label, data: table.column(name), colour: colour(i), dash: i }));
    this.use.draw(lines([["cpu", "processor"], ["memory", "memory"]]));
    this.gpus.forEach((plot, i) => plot.draw(lines([[`gpu/${i}`, "busy"], [`gpu_memory/${i}`, "memory"]])));
  }
}
