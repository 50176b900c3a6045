"""The evaluation's page: tables, plots, and the rejections to look through; see `document` for how it is kept safe."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sstf.evaluation import tables
from sstf.evaluation.document import document, gallery, paragraph, table
from sstf.evaluation.rejections import CAUSES, Rejection

STYLE = """
#filters { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; align-items: end; }
#filters label { display: grid; font-size: .85rem; color: var(--soft); }
input, select, button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; padding: .25rem .5rem; }
#causes { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem; }
#causes button[aria-pressed=true] { border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark); }
#list { max-height: 24rem; overflow: auto; border: 1px solid var(--line); background: var(--panel); margin: 0;
  padding: 0; list-style: none; }
#list li { padding: .2rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; cursor: default; }
#list li[aria-selected=true] { box-shadow: inset 4px 0 0 var(--mark); }
.code { font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.emitted { background: var(--good); } .drafted { background: var(--wrong); text-decoration: line-through; }
#detail { border: 1px solid var(--line); background: var(--panel); padding: .6rem; margin-top: .5rem;
  overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const state = { cause: "", arm: "", position: "", search: "" };
for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in state) state[key] = value;
let shown = [], current = 0;
function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}
function matches(one, but) {
  return (but === "cause" || !state.cause || one.causes.includes(state.cause))
    && (!state.arm || one.arm === state.arm)
    && (!state.position || String(one.position) === state.position)
    && (!state.search || (one.before + one.emitted + one.after + "\\n" + one.drafted).includes(state.search));
}
function visible(text) { return text.replace(/\\n/g, "\\u21b5").replace(/\\t/g, "\\u21e5"); }
function context(one, before, after) {
  const line = make("span", undefined, "code");
  line.append(visible(one.before.slice(-before)), make("span", visible(one.drafted), "drafted"),
    make("span", visible(one.emitted), "emitted"), visible(one.after.slice(0, after)));
  return line;
}
function drawCauses() {
  at("causes").replaceChildren(...data.causes.map(([cause, advice]) => {
    const count = data.rejections.filter(one => matches(one, "cause") && one.causes.includes(cause)).length;
    const button = make("button", `${cause}: ${count}`);
    button.type = "button";
    button.title = advice;
    button.setAttribute("aria-pressed", state.cause === cause);
    button.addEventListener("click", () => { state.cause = state.cause === cause ? "" : cause; draw(); });
    const item = make("li");
    item.append(button);
    return item;
  }));
}
function select(index, move) {
  const items = at("list").children;
  if (!items.length) { at("detail").textContent = "nothing matches"; return; }
  current = Math.max(0, Math.min(items.length - 1, index));
  for (const item of items) item.setAttribute("aria-selected", "false");
  items[current].setAttribute("aria-selected", "true");
  at("list").setAttribute("aria-activedescendant", items[current].id);
  if (move) items[current].scrollIntoView({ block: "nearest" });
  const one = shown[current];
  const text = context(one, 400, 200);
  at("detail").replaceChildren(
    make("p", `${one.prompt} (${one.category}), ${one.arm}, draft position ${one.position}: ${one.causes.join(", ")}`),
    make("p", `target: ${(100 * one.emitted_prob).toFixed(1)} % for the emitted token, ` +
      `${(100 * one.drafted_prob).toFixed(1)} % for the drafted one; entropy ${one.entropy.toFixed(2)} nats`),
    text);
}
function draw() {
  shown = data.rejections.filter(one => matches(one)).slice(0, 500);
  const all = data.rejections.filter(one => matches(one)).length;
  const rest = all > shown.length ? `, the first ${shown.length} below` : "";
  at("count").textContent = `${all} of ${data.rejections.length}${rest}`;
  at("list").replaceChildren(...shown.map((one, number) => {
    const item = make("li");
    item.id = `r${number}`;
    item.setAttribute("role", "option");
    item.append(context(one, 50, 20));
    item.addEventListener("click", () => select(number, false));
    return item;
  }));
  drawCauses();
  select(0, false);
  const kept = Object.entries(state).filter(([, value]) => value);
  history.replaceState(null, "", kept.length ? "#" + new URLSearchParams(kept) : location.pathname);
}
function options(id, values) {
  at(id).append(new Option("all", ""), ...values.map(value => new Option(value, value)));
  at(id).value = state[id];
  at(id).addEventListener("change", () => { state[id] = at(id).value; draw(); });
}
if (at("list")) {
  options("arm", [...new Set(data.rejections.map(one => one.arm))]);
  options("position", [...new Set(data.rejections.map(one => one.position))].sort((a, b) => a - b).map(String));
  at("search").value = state.search;
  at("search").addEventListener("input", () => { state.search = at("search").value; draw(); });
  at("list").addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (step) { event.preventDefault(); select(current + step, true); }
  });
  draw();
}
"""


def page(report: dict[str, Any], plots: Mapping[str, str], rejections: Sequence[Rejection]) -> str:
    """The whole page, from the content of `report.json`, its plots, and the rejections to show."""
    machine, target = report["hardware"], report["target"]
    parts = [
        paragraph(
            f"{target['name']} in {target['dtype']}, engine {report['engine']}, sstf {report['sstf']}, "
            f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; suite "
            f"{report['eval'].get('suite')}, at most {report['eval'].get('max_new_tokens')} new tokens, "
            f"{report['eval'].get('repeats')} repeats.",
        ),
        "<h2>Results</h2>",
        _table(tables.overall(report), noted=True),
        "<h2>Plots</h2>",
        gallery(plots),
    ]
    for name, found in tables.groups(report):
        parts += [f"<h2>By {name}</h2>", _table(found, noted=True)]
    if report["limits"]:
        parts += ["<h2>Limits</h2>", _table(tables.limits(report))]
    if report["rejections"]:
        parts += _explorer(report["rejections"], len(rejections))
    parts += [
        "<h2>Formulas</h2><ul>",
        *(
            f"<li><code>{html.escape(name)}</code>: {html.escape(text)}</li>"
            for name, text in report["formulas"].items()
        ),
        "</ul>",
    ]
    causes = [[cause, advice] for cause, advice in CAUSES.items()]
    data = {"causes": causes, "rejections": [vars(one) for one in rejections]}
    title = f"{report['head'] or 'Free baselines'} on {target['name']}"
    return document(title, parts, STYLE, SCRIPT, data)


def _table(found: tables.Table, noted: bool = False) -> str:
    return table(found.headings, found.rows, noted)


def _explorer(counts: dict[str, dict[str, int]], shown: int) -> list[str]:
    total = sum(sum(found.values()) for found in counts.values())
    return [
        "<h2>Rejected drafts</h2>",
        paragraph(
            "Greedy decoding, first repeat. Of the causes that hold for a rejection the table counts the first one, "
            "from left to right; the buttons below count every one."
        ),
        _table(tables.causes(counts)),
        paragraph(
            f"{shown} of {total} can be looked at here: the drafted token crossed out, the emitted one "
            "beside it. In the list, arrow keys, Page Up and Down, Home and End move."
        ),
        '<ul id="causes" aria-label="Filter by cause"></ul>',
        '<div id="filters"><label>arm<select id="arm"></select></label>',
        '<label>draft position<select id="position"></select></label>',
        '<label>text<input id="search" type="search"></label><span id="count" role="status"></span></div>',
        '<ol id="list" role="listbox" tabindex="0" aria-label="Rejected drafts"></ol>',
        '<div id="detail" aria-live="polite"></div>',
    ]  # fmt: skip
