"""Evaluation suites of the hub by a short name: where each lies, and how a row of it becomes one request.

Only first turns: a later turn of MT-Bench or SPEED-Bench answers what the target said, so it would be another request
for every target. Of the large sets the first rows are taken, enough for narrow intervals. Chat instructions that a
bare row lacks (to summarise, to pass the tests) are those that Spec-Bench and EAGLE's evaluation use in substance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sstf.data.config import HubSource
from sstf.data.hub import hub_rows
from sstf.data.rows import BadRow
from sstf.errors import DataError


@dataclass(frozen=True)
class HubSuite:
    """One data set: `text` makes the request of a row, `category` and `id` name columns, `rows` limits its size."""

    repository: str
    split: str
    text: Callable[[Mapping[str, Any]], str]
    subset: str | None = None
    category: str | None = None
    id: str | None = None
    rows: int | None = None


def _mbpp(row: Mapping[str, Any]) -> str:
    return f"{row['text']}\nYour code should pass these tests:\n\n" + "\n".join(row["test_list"])


def _alpaca(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])


HUB_SUITES = {
    "mt-bench": HubSuite(
        "HuggingFaceH4/mt_bench_prompts", "train", lambda row: str(row["prompt"][0]), None, "category", "prompt_id"
    ),
    "gsm8k": HubSuite("openai/gsm8k", "test", lambda row: str(row["question"]), "main"),
    "math-500": HubSuite(
        "HuggingFaceH4/MATH-500", "test", lambda row: str(row["problem"]), None, "subject", "unique_id"
    ),
    "alpaca": HubSuite("tatsu-lab/alpaca", "train", _alpaca, rows=500),
    "mbpp": HubSuite("google-research-datasets/mbpp", "test", _mbpp, "full", id="task_id"),
    "cnn-dm": HubSuite(
        "abisee/cnn_dailymail", "test", lambda row: f"Summarize:\n{row['article']}", "3.0.0", id="id", rows=500
    ),
    "nq": HubSuite("google-research-datasets/nq_open", "validation", lambda row: str(row["question"]), rows=500),
    "speed-bench": HubSuite(
        "nvidia/SPEED-Bench", "test", lambda row: str(row["turns"][0]), "qualitative", "category", "question_id"
    ),
}


def hub_suite_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a suite in the form of a local one: `id`, `category` where the set has any, `prompt`.

    Raises:
        DataError: the set cannot be reached, a row of it lacks a column, or holds a placeholder for its text.
    """
    suite = HUB_SUITES[name]
    seen: set[str] = set()
    # Streamed: of the large sets only the beginning is fetched.
    source = HubSource(name=suite.repository, subset=suite.subset, split=suite.split, streaming=True)
    for number, row in enumerate(islice(hub_rows(source), suite.rows), 1):
        if isinstance(row.value, BadRow):
            raise DataError(f"suite {name}: row {number} cannot be read ({row.value})")
        try:
            prompt = suite.text(row.value)
            fields = {"id": str(row.value[suite.id]) if suite.id else f"{name}-{number}", "prompt": prompt}
            if suite.category:
                fields["category"] = str(row.value[suite.category])
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"suite {name}: row {number} of {suite.repository} has no usable {error}; the set may have changed, "
                "so give a local copy as a JSONL file with `prompt` and `category` in each line"
            ) from None
        if name == "speed-bench" and (not prompt.strip() or prompt in seen):
            raise DataError(
                f"suite {name}: row {number} holds a placeholder, since its source may not be redistributed; fill it "
                "with the set's own preparation script and give the JSONL file that this writes"
            )
        seen.add(prompt)
        yield fields
