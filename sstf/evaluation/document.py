"""A report's page as one HTML file: the look, tables and plots, without any request to elsewhere.

Texts are escaped or arrive as JSON, never as HTML; a content security policy allows the page's own style and script by
their hashes and nothing else. What stands on a page is left to its report: `evaluation.page`, `bench.page`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --panel: #fff; --ink: #1c1e21; --soft: #5f6570; --line: #d9dbdf; --mark: #0b57d0;
  --good: #cdeed6; --wrong: #fbd9d5;
  --c0: #1f6feb; --c1: #d1242f; --c2: #1a7f37; --c3: #9a6700; --c4: #8250df; --c5: #57606a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #17181b; --panel: #202226; --ink: #e6e7ea; --soft: #a0a6b1; --line: #3a3d44; --mark: #8ab4f8;
    --good: #14502c; --wrong: #6b221c;
    --c0: #6ea8fe; --c1: #ff7b72; --c2: #56d364; --c3: #e3b341; --c4: #d2a8ff; --c5: #9da7b3;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .note td:last-child, .note th:last-child { text-align: left; white-space: normal; }
.note td:last-child { min-width: 10rem; }
#figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .8rem; }
svg { width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
svg text { fill: var(--ink); }
.grid { stroke: var(--line); }
.axis { stroke: var(--ink); }
.line { fill: none; stroke-width: 2; }
.line.s0 { stroke: var(--c0); } .line.s1 { stroke: var(--c1); } .line.s2 { stroke: var(--c2); }
.line.s3 { stroke: var(--c3); } .line.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c5); }
.mark.s0 { fill: var(--c0); } .mark.s1 { fill: var(--c1); } .mark.s2 { fill: var(--c2); }
.mark.s3 { fill: var(--c3); } .mark.s4 { fill: var(--c4); } .mark.s5 { fill: var(--c5); }
:focus-visible { outline: 2px solid var(--mark); }
"""


def document(title: str, body: Sequence[str], style: str = "", script: str = "", data: Any = None) -> str:
    """The whole file.

    Args:
        title: as plain text; also the heading.
        body: HTML behind the heading.
        style: of this page, beside what pages share.
        script: of this page.
        data: what the script reads, as JSON, from the element `data`.
    """
    style = STYLE + style
    policy = f"default-src 'none'; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    scripts = []
    if script:
        policy += f"; script-src {_hash(script)}"
        # `<` alone could open a tag or a comment inside the script element
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        scripts = [f'<script type="application/json" id="data">{text}</script>', f"<script>{script}</script>"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *body,
        *scripts,
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    """In a softer colour."""
    return f'<p class="soft">{html.escape(text)}</p>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], noted: bool = False) -> str:
    """The cells are texts; `noted`: the last column holds sentences."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    name = "wide note" if noted else "wide"
    return f'<div class="{name}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def gallery(plots: Mapping[str, str]) -> str:
    """Plots of `charts` side by side."""
    return "\n".join(['<div id="figures">', *plots.values(), "</div>"])


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
