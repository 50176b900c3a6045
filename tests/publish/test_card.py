"""The card tells what was recorded, and says where nothing was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sstf.decode import CostModel
from sstf.decode.cost import KNOTS
from sstf.methods.checkpoint import StoredHead, read_head
from sstf.publish.card import BaseModel, CardFacts, Depths, depths, plots, write_card
from sstf.publish.gate import Verdict
from sstf.publish.record import Curve, RunRecord, read_record

EMPTY = RunRecord(starts=[])


def row(**changes: Any) -> dict[str, Any]:
    fields = {
        "arm": "chain",
        "temperature": 0.0,
        "category": "all",
        "prompts": 4,
        "accepted_length": 2.5,
        "accepted_length_ci": [2.25, 2.75],
        "survival": [0.8, 0.5, 0.2],
        "tokens_per_second": 20.0,
        "speedup": 1.5,
        "speedup_ci": [1.25, 1.75],
        "draft_ms": 30.0,
        "verify_ms": 40.0,
        "identical": 1.0,
        "void": None,
    }
    return fields | changes


def evaluated(*rows: dict[str, Any], **policies: Any) -> RunRecord:
    policies = policies or {"chain": {"kind": "chain", "depth": 3, "lookup": False}}
    report = {
        "target": {"dtype": "bfloat16"},
        "eval": {
            "suite": "builtin",
            "max_new_tokens": 64,
            "repeats": 2,
            "top_p": 0.9,
            "policies": policies,
        },
        "engine": "sstf",
        "hardware": {"gpu": "H200", "processor": "x", "threads": 4, "torch": "2.13"},
        "formulas": {"accepted_length": "tokens / passes"},
        "rows": list(rows),
        "seed": 7,
    }
    return RunRecord(starts=[], evaluation=report)


@pytest.fixture(scope="session")
def stored(head: Path) -> StoredHead:
    return read_head(head)


def card(stored: StoredHead, record: RunRecord, **changes: Any) -> str:
    facts = CardFacts(
        repo="ann/tiny-head",
        base=BaseModel("org/model", "c0ffee", "apache-2.0"),
        stored=stored,
        record=record,
        engines=("vllm", "sglang"),
        left_out={},
        verdicts=[Verdict("head", True, "whole")],
        forced=False,
    )
    return write_card(replace(facts, **changes))


def front_matter(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return fields


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_front_matter(stored: StoredHead) -> None:
    assert front_matter(card(stored, EMPTY)) == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "sstf",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "eagle3", "vllm", "sglang"],
        "license": "apache-2.0",
    }


def test_a_target_without_an_address_is_not_linked(stored: StoredHead) -> None:
    text = card(stored, EMPTY, base=BaseModel("tiny"))
    assert "base_model" not in front_matter(text) and "license" not in front_matter(text)
    assert "huggingface.co/tiny" not in text and "| base model | `tiny` |" in text


def test_what_is_not_recorded_is_said(stored: StoredHead) -> None:
    text = card(stored, EMPTY, base=BaseModel("org/model"))
    for line in (
        "| its revision | not recorded |",
        "| made with | sstf not recorded |",
        "Evaluation: not recorded.",
        "Not measured, at no batch size.",
        "| data | not recorded |",
        "| its size | not recorded conversations, not recorded tokens, of which not recorded",
        "| answers | not recorded |",
        "| decontamination | not recorded |",
        "| hardware | not recorded |",
        "| hours | training: not recorded; the data's answers and the features: not recorded |",
        "Of this head: not stated.",
    ):
        assert line in text, line
    assert "None" not in text and "nan" not in text


def test_figures_stand_with_protocol_and_interval(stored: StoredHead) -> None:
    text = card(stored, evaluated(row(), row(category="maths", prompts=2), row(arm="tree", void="broken")))
    assert "Suite `builtin`, 4 prompts, at most 64 new tokens, 2 runs of each, top-p 0.9, seed 7, batch 1; " in text
    assert "bfloat16, on H200 (4 threads, torch 2.13)" in text
    assert "| chain (depth 3) | 0 | 2.50 (2.25 to 2.75) | 20.0 | 1.50 (1.25 to 1.75) | 100% |  |" in text
    assert "| chain | maths | 0 | 2 | 2.50 (2.25 to 2.75) | 1.50 (1.25 to 1.75) |  |" in text
    assert "| void: broken |" in text
    assert "- `accepted_length`: tokens / passes" in text


def test_the_run_is_told(head: Path, stored: StoredHead) -> None:
    """Against the files of the run itself, and what `conftest` put into its configuration."""
    record = read_record(head).for_others()
    text = card(stored, record)
    assert record.training is not None and record.data is not None and record.evaluation is not None
    tokens, pace = record.training["trained_tokens"], record.training["tokens_per_second"]
    assert f"training: {tokens / pace / 3600:.2f} ({tokens:,} tokens at {pace:,.0f} a second)" in text
    assert f"coverage of held-out tokens {record.training['draft_vocab_coverage']:.1%}" in text
    assert "| data | jsonl chats.jsonl |" in text
    assert f"| its size | {record.data['kept']} conversations, {record.data['tokens']} tokens" in text
    assert "written again by the base model (in process; temperatures 0; top-p 0.95, top-k 256; at most 16" in text
    assert "trained on at most 96" in text
    assert '"step_tokens": 128' in text and '"precision": "fp32"' in text
    checked = record.data["contamination"]["checked"]
    assert f"{checked} conversations compared with the prompts of" in text
    assert "4 training conversations hold a prompt of the evaluation above" in text  # see `conftest`
    assert "/tmp" not in text


def test_a_second_phase_is_told(head: Path, stored: StoredHead) -> None:
    record = read_record(head)
    assert record.training is not None and "own rollouts" not in card(stored, record)
    starts = [{**record.starts[-1], "config": {**record.config, "on_policy": {"rounds": 2, "steps": 50}}}]
    figures = {"rounds": [{}, {}], "accepted_length_before": 1.5, "accepted_length": 1.75}
    text = card(stored, replace(record, starts=starts, training=record.training | figures))
    assert '(the rows below are of the last of 2 rounds) | `{"rounds": 2, "steps": 50}`; accepted length' in text
    assert "on held-out text 1.500 -> 1.750 |" in text


def test_verdicts_and_force(stored: StoredHead) -> None:
    failed = [Verdict("doctor: a|b", False, "0.2\nof 1")]
    text = card(stored, EMPTY, verdicts=failed, forced=True)
    assert "| doctor: a\\|b | **fail** | 0.2 of 1 |" in text
    assert "**Published although a check failed" in text
    assert "although a check failed" not in card(stored, EMPTY)


def test_launch_lines(stored: StoredHead) -> None:
    text = card(stored, evaluated(row()))
    assert 'vllm serve org/model --speculative-config \'{"method": "eagle3", "model": "tiny-head/vllm",' in text
    assert "--speculative-num-steps 2 \\\n    --speculative-eagle-topk 1 --speculative-num-draft-tokens 3" in text
    assert "hf download ann/tiny-head --include 'sglang/*' --local-dir tiny-head" in text
    alone = card(stored, EMPTY, engines=("vllm",), left_out={"sglang": "it has no such norm"})
    assert "sglang.launch_server" not in alone and "No form for sglang: it has no such norm." in alone


@pytest.mark.parametrize(
    ("modes", "told"),
    [
        (None, "batch 1; mode: not recorded."),
        ({"default": 4}, "thinking is left to the chat template, and was not measured on and off apart."),
        ({"thinking": 4}, "prompts by mode: 4 thinking."),
        ({"thinking": 1, "plain": 3}, "prompts by mode: 1 thinking, 3 plain."),
    ],
)
def test_modes(stored: StoredHead, modes: dict[str, int] | None, told: str) -> None:
    record = evaluated(row())
    assert record.evaluation is not None
    record.evaluation["modes"] = modes
    assert told in card(stored, record)


# ---- recommended depth -----------------------------------------------------------------------------------------------


PLAIN = row(arm="plain", survival=[], draft_ms=0.0, verify_ms=36.0)


def test_depths_by_hand() -> None:
    """Tokens a pass 1.8, 2.3, 2.5; a pass takes 50, 60, 70 ms, a plain one 36."""
    found = depths(evaluated(PLAIN, row()))
    assert found == Depths([1.8, 2.3, 2.5], {1: [1.296, 1.38, 1.286]})
    assert found.best(1) == (2, 1.38)


def test_slow_drafting_pays_less(stored: StoredHead) -> None:
    """140, 240, 340 ms: 1.8 * 36 / 140 and so on, all below 1."""
    record = evaluated(PLAIN, row(draft_ms=300.0))
    assert depths(record) == Depths([1.8, 2.3, 2.5], {1: [0.463, 0.345, 0.265]})
    assert "- batch 1: do not draft, no depth is faster" in card(stored, record)


def test_depths_by_batch(stored: StoredHead) -> None:
    """A verify pass of one, two, four rows: at batch 1 the rows cost nothing, at batch 8 each of them as much again."""
    record = evaluated(PLAIN, row())
    assert record.evaluation is not None
    flat = CostModel([0.01] * 9, draft_s=0.001, host_s=0.0)
    steep = CostModel([0.01 * rows for rows in KNOTS], draft_s=0.001, host_s=0.0)
    record.evaluation["costs"] = {"1": flat.to_json(), "8": steep.to_json()}
    found = depths(record)
    assert found is not None
    assert found.speedup == {
        1: [round(1.8 / 1.1, 3), round(2.3 / 1.2, 3), round(2.5 / 1.3, 3)],
        8: [round(1.8 / 2.1, 3), round(2.3 / 3.2, 3), round(2.5 / 4.3, 3)],
    }
    text = card(stored, record)
    assert "| depth | accepted length | speedup, batch 1 | speedup, batch 8 |" in text
    assert "| 3 | 2.50 | 1.92 | 0.58 |" in text
    assert "- batch 1: 3\n- batch 8: do not draft, no depth is faster" in text


@pytest.mark.parametrize(
    "record",
    [
        EMPTY,
        evaluated(row()),
        evaluated(PLAIN, row(void="impossible")),
        evaluated(PLAIN, row(temperature=1.0)),
        evaluated(PLAIN, row(category="maths")),
        evaluated(PLAIN, row(), chain={"kind": "dynamic", "depth": 3, "lookup": False}),
        evaluated(PLAIN, row(), chain={"kind": "chain", "depth": 3, "lookup": True}),
    ],
    ids=["none", "no plain row", "void", "drawn", "category", "tree", "lookup"],
)
def test_depth_is_not_guessed(record: RunRecord) -> None:
    assert depths(record) is None


def test_modes_and_lengths_apart(stored: StoredHead) -> None:
    record = evaluated(row())
    assert record.evaluation is not None
    record.evaluation["by_mode"] = [row(category="thinking"), row(category="plain", accepted_length=1.9)]
    record.evaluation["by_length"] = []
    text = card(stored, record)
    assert "### By mode" in text and "### By prompt length" not in text
    assert "| chain | plain | 0 | 4 | 1.90 (2.25 to 2.75) | 1.50 (1.25 to 1.75) |  |" in text


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_plots_are_of_what_was_measured() -> None:
    assert plots(EMPTY) == {}
    curve = Curve([2, 4], [1.1, 1.3])
    made = plots(replace(evaluated(row(), row(arm="plain", survival=[])), curve=curve))
    assert list(made) == ["acceptance", "training"]
    assert "chain: 1, 0.8" in made["acceptance"] and "plain" not in made["acceptance"]
    assert "held-out conversations: 4, 1.3" in made["training"]


def test_the_card_shows_the_files_that_are_there(stored: StoredHead) -> None:
    record = evaluated(row())
    assert "![" not in card(stored, record)
    shown = {"acceptance": "acceptance.png"}
    assert "![Passes that accept a draft position](acceptance.png)" in card(stored, record, shown=shown)
