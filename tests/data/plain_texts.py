"""Texts that repeat themselves with good reason: no loop detector may take them for a loop."""

from __future__ import annotations

import json

_COUNTRIES = {
    "France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo",
    "Canada": "Ottawa", "Egypt": "Cairo", "Chile": "Santiago", "Greece": "Athens", "Cuba": "Havana", "Iran": "Tehran",
}  # fmt: skip

SENTENCES = "\n".join(
    f"{number}. The capital of {country} is {capital}." for number, (country, capital) in enumerate(_COUNTRIES.items())
)

MARKDOWN_TABLE = "\n".join(
    [
        "Here is the comparison that you asked for:\n",
        "| Country | Capital | Letters | Index |",
        "|---|---|---|---|",
        *(f"| {a} | {b} | {len(a)} | {i} |" for i, (a, b) in enumerate(_COUNTRIES.items(), start=1)),
    ]
)

WIDE_TABLE = "\n".join(
    line
    for a, b in list(_COUNTRIES.items())[:6]
    for line in ("+----------------+----------------+--------+", f"| {a:<14} | {b:<14} | {len(a):>6} |")
)

HTML_TABLE = "<table>\n" + "".join(
    f"  <tr>\n    <td>{a}</td>\n    <td>{b}</td>\n    <td>{len(b)}</td>\n  </tr>\n" for a, b in _COUNTRIES.items()
) + "</table>"  # fmt: skip

JSON_LIST = json.dumps(
    [
        {"country": a, "capital": b, "letters": len(a), "visited": i % 3 == 0}
        for i, (a, b) in enumerate(_COUNTRIES.items())
    ],
    indent=2,
)

MULTIPLICATION = "\n".join(f"7 x {i} = {7 * i}" for i in range(1, 21))

BOARD = """A game of life needs a board of cells. In Python it may be a list of lists, one a row:

```python
board = [
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
]

def neighbours(board, row, column):
    cells = [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return sum(board[i][j] for i, j in cells if 0 <= i < len(board) and 0 <= j < len(board[0]))
```

The three living cells in the middle turn by a quarter with every step, which is why the pattern is called a blinker.
"""

UNIT_TESTS = """import pytest

from calculator import add, divide, multiply, subtract


def test_add():
    assert add(1, 2) == 3
    assert add(-1, 1) == 0
    assert add(0, 0) == 0
    assert add(10, -4) == 6


def test_subtract():
    assert subtract(5, 3) == 2
    assert subtract(0, 7) == -7
    assert subtract(-2, -9) == 7


def test_multiply():
    assert multiply(3, 4) == 12
    assert multiply(-2, 8) == -16
    assert multiply(0, 99) == 0


def test_divide():
    assert divide(9, 3) == 3
    assert divide(1, 4) == 0.25
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)
"""

REFRAIN = """Blow the wind southerly, southerly, southerly,
Blow the wind south o'er the bonny blue sea;
Blow the wind southerly, southerly, southerly,
Blow bonny breeze, my lover to me.

They told me last night there were ships in the offing,
And I hurried down to the deep rolling sea;
But my eye could not see it wherever might be it,
The bark that is bearing my lover to me.

Blow the wind southerly, southerly, southerly,
Blow bonny breeze o'er the bonny blue sea;
Blow the wind southerly, southerly, southerly,
Blow bonny breeze, and bring him to me.
"""

ALGEBRA = """We solve 3x + 5 = 2x + 12 step by step.

Step 1: Subtract 2x from both sides: 3x - 2x + 5 = 2x - 2x + 12, so x + 5 = 12.
Step 2: Subtract 5 from both sides: x + 5 - 5 = 12 - 5, so x = 7.
Step 3: Check: 3 * 7 + 5 = 21 + 5 = 26, and 2 * 7 + 12 = 14 + 12 = 26.

Both sides are 26, so the answer is x = 7.
"""

CHINESE_LIST = "\n".join(
    f"{number}. {step}：请在第{number}天完成这一步，并且记录结果。"
    for number, step in enumerate(["测量", "设计", "采购", "组装", "调试", "验收"], start=1)
)

PLAIN_TEXTS = {
    "sentences": SENTENCES,
    "markdown table": MARKDOWN_TABLE,
    "wide table": WIDE_TABLE,
    "html table": HTML_TABLE,
    "json": JSON_LIST,
    "multiplication": MULTIPLICATION,
    "board": BOARD,
    "unit tests": UNIT_TESTS,
    "refrain": REFRAIN,
    "algebra": ALGEBRA,
    "chinese list": CHINESE_LIST,
}
