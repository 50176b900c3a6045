"""The page of `preview.preview_html`: one file without any request to elsewhere, readable in light and dark.

All text arrives as JSON and is put on the page as text, never as HTML; a content security policy allows this style and
this script by their hashes and nothing else, so that no token of any data set can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --panel: #fff; --ink: #1c1e21; --soft: #5f6570; --line: #d9dbdf; --mark: #0b57d0;
  --trained-a: #cdeed6; --trained-b: #b4e3c2; --trained-line: #15803d; --special: #8a1c9c; --special-page: #f6e6f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #17181b; --panel: #202226; --ink: #e6e7ea; --soft: #a0a6b1; --line: #3a3d44; --mark: #8ab4f8;
    --trained-a: #14502c; --trained-b: #1b6639; --trained-line: #6ee79a; --special: #f0a6ff; --special-page: #43204b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; height: 100vh; display: grid; grid-template: auto minmax(0, 1fr) auto / 17rem minmax(0, 1fr);
  grid-template-areas: "top top" "list sample" "detail detail";
  background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
}
header { grid-area: top; padding: .7rem 1rem; border-bottom: 1px solid var(--line); background: var(--panel); }
h1 { font-size: 1.1rem; margin: 0 0 .2rem; }
header p { margin: 0 0 .3rem; color: var(--soft); }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
kbd { border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; font-size: .85em; }
nav { grid-area: list; display: flex; flex-direction: column; min-height: 0; border-right: 1px solid var(--line); }
#filters { padding: .6rem; display: grid; gap: .4rem; }
#filters label { display: grid; gap: .1rem; font-size: .85rem; color: var(--soft); }
input, select, button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 4px; padding: .25rem .5rem; min-width: 0; }
#count { padding: 0 .6rem .4rem; font-size: .85rem; color: var(--soft); }
#list { list-style: none; margin: 0; padding: 0; overflow: auto; flex: 1; min-height: 0; }
#list button { width: 100%; text-align: left; border: 0; border-top: 1px solid var(--line); border-radius: 0;
  background: none; overflow-wrap: anywhere; cursor: pointer; }
#list button[aria-current=true] { background: var(--panel); box-shadow: inset 4px 0 0 var(--mark); }
#list small { display: block; color: var(--soft); }
main { grid-area: sample; overflow: auto; padding: .8rem 1rem 2rem; min-width: 0; }
#figures { color: var(--soft); margin: .1rem 0 .8rem; }
#tokens { white-space: pre-wrap; word-break: break-all; line-height: 1.9;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono", monospace; font-size: .92rem; }
.token { padding: .12em 0; cursor: default; color: var(--ink); border-bottom: 2px solid transparent; }
.token:nth-child(even) { border-bottom-color: var(--line); }
.trained { background: var(--trained-a); border-bottom-color: var(--trained-line); }
.trained:nth-child(even) { background: var(--trained-b); border-bottom-color: var(--trained-line); }
.special { color: var(--special); font-weight: 600; }
.special:not(.trained) { background: var(--special-page); }
.first { font-weight: 700; outline: 2px solid var(--trained-line); outline-offset: -1px; }
.first::before { content: "\\25B6 "; color: var(--trained-line); }
.last::after { content: " \\25C0"; color: var(--trained-line); }
.gap, .part { color: var(--soft); font-style: italic; }
.unknown { text-decoration: underline wavy #d33; }
.token:focus, .token:hover { outline: 2px solid var(--mark); outline-offset: 0; }
:focus-visible { outline: 2px solid var(--mark); }
footer { grid-area: detail; padding: .5rem 1rem; border-top: 1px solid var(--line); background: var(--panel);
  min-height: 2.4rem; overflow-wrap: anywhere; font: .85rem ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 44rem) {
  body { height: auto; min-height: 100vh; grid-template: auto auto auto auto / minmax(0, 1fr);
    grid-template-areas: "top" "list" "sample" "detail"; }
  nav { border-right: 0; border-bottom: 1px solid var(--line); }
  #list { max-height: 11rem; }
  footer { position: sticky; bottom: 0; }
}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [TRAINED, SPECIAL, UNKNOWN, PART, GAP] = [1, 2, 4, 8, 16];
const at = id => document.getElementById(id);
const share = (part, whole) => whole ? (100 * part / whole).toFixed(1) + " %" : "-";
const add = (parent, tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  parent.append(element);
  return element;
};
let shown = [], current = -1;

function filter() {
  const source = at("source").value, wanted = at("search").value.toLowerCase();
  const before = shown[current];
  shown = data.samples.filter(s => (!source || s.source === source) && s.id.toLowerCase().includes(wanted));
  at("list").replaceChildren();
  shown.forEach((sample, index) => {
    const button = add(add(at("list"), "li"), "button", sample.id);
    button.type = "button";
    add(button, "small", `${sample.tokens} tokens, ${share(sample.trained, sample.tokens)} trained`);
    button.addEventListener("click", () => show(index));
  });
  at("count").textContent = `${shown.length} of ${data.samples.length} samples`;
  show(Math.max(0, shown.indexOf(before)));
}

function show(index) {
  current = shown.length ? Math.min(Math.max(index, 0), shown.length - 1) : -1;
  [...at("list").querySelectorAll("button")].forEach((button, i) => {
    button.setAttribute("aria-current", i === current);
    if (i === current) button.scrollIntoView({ block: "nearest" });
  });
  at("tokens").replaceChildren();
  at("detail").textContent = "Point at a token, or step through them with the arrow keys.";
  const sample = shown[current];
  at("name").textContent = sample ? sample.id : "No sample fits the filter.";
  at("figures").textContent = "";
  if (!sample) return;
  at("figures").textContent = [sample.source, `${sample.tokens} tokens`,
    `${sample.trained} trained (${share(sample.trained, sample.tokens)})`, `trained turns: ${sample.turns}`].join(", ");
  let position = 0, before = false;
  sample.ids.forEach((id, i) => {
    const flags = sample.flags[i], [text, quoted] = data.texts[sample.texts[i]];
    if (flags & GAP) {
      add(at("tokens"), "span", text, "gap");
      position += id;
      before = Boolean(flags & TRAINED);
      return;
    }
    const trained = Boolean(flags & TRAINED), after = Boolean((sample.flags[i + 1] ?? 0) & TRAINED);
    const names = ["token", trained && "trained", flags & SPECIAL && "special", flags & UNKNOWN && "unknown",
      flags & PART && "part", trained && !before && "first", trained && !after && "last"].filter(Boolean);
    const token = add(at("tokens"), "span", text, names.join(" "));
    token.tabIndex = -1;
    const kind = names.slice(1).join(", ") || "context";
    const detail = `position ${position}  id ${id}  text ${quoted}  token ${data.vocabulary[id]}  ${kind}`;
    token.setAttribute("aria-label", detail);
    token.addEventListener("focus", () => { at("detail").textContent = detail; });
    token.addEventListener("mouseenter", () => { at("detail").textContent = detail; });
    token.addEventListener("click", () => token.focus());
    position += 1;
    before = trained;
  });
  const first = at("tokens").querySelector(".token");
  if (first) first.tabIndex = 0;
}

function step(to) {
  if (!to) return;
  at("tokens").querySelectorAll("[tabindex='0']").forEach(token => { token.tabIndex = -1; });
  to.tabIndex = 0;
  to.focus();
}

const sources = new Map();
data.samples.forEach(s => sources.set(s.source, (sources.get(s.source) ?? 0) + 1));
add(at("source"), "option", `all (${data.samples.length})`).value = "";
sources.forEach((count, source) => { add(at("source"), "option", `${source} (${count})`).value = source; });
at("source").addEventListener("change", filter);
at("search").addEventListener("input", filter);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return document.activeElement.blur();
  if (event.target.matches("input, select")) return;
  const tokens = [...at("tokens").querySelectorAll(".token")], here = tokens.indexOf(document.activeElement);
  const actions = {
    j: () => show(current + 1),
    k: () => show(current - 1),
    ArrowRight: () => step(tokens[here + 1]),
    ArrowLeft: () => step(tokens[Math.max(here - 1, 0)]),
    Home: () => step(tokens[0]),
    End: () => step(tokens[tokens.length - 1]),
    t: () => step(tokens.find((token, i) => i > here && token.classList.contains("first"))),
    "/": () => at("search").focus(),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
filter();
"""


def page(title: str, summary: str, data: dict[str, Any]) -> str:
    """The whole file; `title` and `summary` are plain text, `data` is what `SCRIPT` reads."""
    # Within a script element only `</script` and `<!--` mean anything to HTML; no `<` at all is simplest.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summary)}</p>
<p><span class="token">context</span> <span class="token trained">trained</span>
<span class="token trained first">first after a prompt</span> <span class="token trained last">last of a turn</span>
<span class="token special">special</span> <span class="part">&#x22ef; part of a character</span> &middot;
<kbd>j</kbd> <kbd>k</kbd> samples, <kbd>&larr;</kbd> <kbd>&rarr;</kbd> tokens, <kbd>t</kbd> next trained turn,
<kbd>/</kbd> search</p>
<noscript><p>This page needs JavaScript; it loads nothing from elsewhere.</p></noscript>
</header>
<nav aria-label="Samples">
<div id="filters">
<label>Source <select id="source"></select></label>
<label>Search by id <input id="search" type="search" autocomplete="off"></label>
</div>
<div id="count" role="status"></div>
<ul id="list"></ul>
</nav>
<main>
<h2 id="name"></h2>
<div id="figures"></div>
<div id="tokens" aria-label="Tokens"></div>
</main>
<footer id="detail" aria-live="polite"></footer>
<script type="application/json" id="data">{embedded}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
