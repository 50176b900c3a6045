"""A whole measurement on the tiny target, and its report in every form."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from sstf.data.progress import NoProgress
from sstf.evaluation import EvalConfig, Evaluation, measure, write_report
from sstf.evaluation.metrics import Record
from sstf.evaluation.report import training_curve
from sstf.evaluation.run import _prepare, _vocabulary_cap
from sstf.methods import Eagle3Config, SuffixConfig, TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain, CostAwareTree, DynamicTree

SCHEMA = json.loads(resources.files("sstf.evaluation").joinpath("report.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": "hi", "prompt": "Hi", "category": "a"},
        {"id": "hello", "prompt": "Hello user", "category": "b", "mode": "thinking"},
        {"id": "long", "prompt": "moon " * 28, "category": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def config(suite: str) -> EvalConfig:
    policies = {"chain": Chain(depth=2), "tree": DynamicTree(depth=3, top_k=3, total_tokens=8)}
    return EvalConfig(suite=suite, max_new_tokens=24, repeats=2, policies=policies)


@pytest.fixture(scope="module")
def evaluation(tiny_target: Target, config: EvalConfig) -> Evaluation:
    """Of an untrained head with half the vocabulary."""
    method = build_method(Eagle3Config(draft_vocab_size=150))
    assert isinstance(method, TrainableMethod)
    torch.manual_seed(0)
    module = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(0, 300, 2))
    head = DraftHead("untrained", method, module.eval().requires_grad_(False))
    return measure(tiny_target, head, config, NoProgress(), seed=1)


def test_rejections_are_the_passes_that_a_draft_did_not_fill(evaluation: Evaluation) -> None:
    """Of a chain: every pass shorter than depth + 1, of the first repeat; the last pass of a text may be cut short."""
    [histogram] = [d.histogram for d in evaluation.distributions if (d.arm, d.temperature) == ("chain", 0.0)]
    short = sum(histogram[:2]) / 2  # two repeats of greedy decoding say the same
    found = sum(evaluation.rejections.counts["chain"].values())
    assert short - 3 <= found <= short and found > 10
    assert set(evaluation.rejections.counts) == {"chain", "tree"}
    assert {one.position for one in evaluation.rejections.kept if one.arm == "chain"} <= {1, 2}


def test_rejected_tokens_are_what_greedy_decoding_would_not_say(evaluation: Evaluation) -> None:
    for one in evaluation.rejections.kept:
        assert one.drafted_prob <= one.emitted_prob + 1e-4
        assert one.causes
    outside = [one for one in evaluation.rejections.kept if one.causes[0] == "outside the draft vocabulary"]
    assert outside, "half the tokens cannot be drafted"


def test_limits_hold(evaluation: Evaluation) -> None:
    assert [(one.arm, one.temperature) for one in evaluation.limits] == [
        ("chain", 0.0), ("tree", 0.0), ("chain", 1.0), ("tree", 1.0),
    ]  # fmt: skip
    rows = {(r.arm, r.temperature): r for r in evaluation.rows if r.category == "all"}
    for one in evaluation.limits:
        row = rows[one.arm, one.temperature]
        assert one.ceiling == row.accepted_length
        assert row.accepted_length / (one.draft_cost + one.verify_cost + one.host_cost) == pytest.approx(row.speedup)
        assert one.vocabulary_cap is not None and 0 < one.vocabulary_cap < 1
        assert (one.tree_oracle is None) == (one.temperature == 0)
        assert (one.constant_rate is None) == (one.arm == "tree")


def test_groups(evaluation: Evaluation) -> None:
    assert {r.category for r in evaluation.by_mode} == {"all", "default", "thinking"}
    assert {r.category for r in evaluation.by_length} == {"all", "under 128 tokens", "128 to 511 tokens"}
    counts = {r.category: r.prompts for r in evaluation.by_length}
    assert counts == {"all": 3, "under 128 tokens": 2, "128 to 511 tokens": 1}
    assert list(evaluation.costs) == [1]


def test_all_of_the_time_is_accounted_for(
    evaluation: Evaluation, tiny_target: Target, config: EvalConfig, tmp_path: Path
) -> None:
    """What the decoders' own clocks say lies within `decoding`, which holds little else."""
    assert set(evaluation.seconds) == {"preparing", "costs", "decoding", "analysis"}
    assert all(seconds > 0 for seconds in evaluation.seconds.values())
    own = sum(p.decode_s for p in evaluation.prompts)
    assert own < evaluation.seconds["decoding"]
    content = write_report(tmp_path, evaluation, tiny_target, None, {})
    assert content["seconds"]["writing"] > 0
    whole = sum(content["seconds"].values())
    assert content["overhead"] == pytest.approx(1 - content["seconds"]["decoding"] / whole, abs=1e-6)
    assert f"an overhead of {content['overhead']:.1%}" in (tmp_path / "report.md").read_text()
    started = time.perf_counter()
    again = measure(tiny_target, None, config.model_copy(update={"repeats": 1}), NoProgress())
    assert sum(again.seconds.values()) == pytest.approx(time.perf_counter() - started, rel=0.02)


def test_costs_are_measured_once(tiny_target: Target, config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that decides by costs starts from those of the evaluation."""

    def again(*_: object) -> None:
        raise AssertionError("measured by the arm itself")

    monkeypatch.setattr("sstf.decode.engine.measure_costs", again)
    head = DraftHead("suffix", build_method(SuffixConfig()))
    changes = {"policies": {"aware": CostAwareTree(depth=2, total_tokens=4)}, "repeats": 1, "max_new_tokens": 4}
    found = measure(tiny_target, head, config.model_copy(update=changes), NoProgress())
    assert list(found.costs) == [1] and "aware" in {row.arm for row in found.rows}


def test_the_vocabulary_cap_against_all_distributions(tiny_target: Target, config: EvalConfig) -> None:
    """Greedy: the share of the text's tokens. Drawn: the mean over a sample of the prompts, here 2 of 3."""
    drafts = torch.arange(300) % 2 == 0
    setting = _prepare(tiny_target, {}, config, 0)
    texts = [[4, 7, 8, 10], [12, 3, 5], [6, 6, 9, 11, 2]]
    plain = [
        Record(prompt.id, "a", [1] * (len(text) - 1), text, 1.0, 0.0, 1.0)
        for prompt, text in zip(setting.prompts, texts, strict=True)
    ]
    assert _vocabulary_cap(setting, plain, 0.0, drafts) == pytest.approx(7 / 12)
    masses: list[float] = []
    with torch.inference_mode():
        for index in (0, 1):
            ids = torch.tensor([[*setting.encoded[index], *texts[index]]])
            hidden = tiny_target.decoder(ids, use_cache=False).last_hidden_state[0]
            probs = tiny_target.frozen_head.native_logits(hidden).float().div(0.5).softmax(-1)
            masses += probs[len(setting.encoded[index]) - 1 : -1, drafts].sum(-1).tolist()
    assert _vocabulary_cap(setting, plain, 0.5, drafts) == pytest.approx(sum(masses) / len(masses), rel=1e-5)


def test_figures_by_prompt_add_up(evaluation: Evaluation) -> None:
    for row in evaluation.rows:
        own = [p for p in evaluation.prompts if (p.arm, p.temperature) == (row.arm, row.temperature)]
        if row.category == "all":
            assert sum(p.tokens for p in own) / sum(p.passes for p in own) == pytest.approx(row.accepted_length)
    for one in evaluation.distributions:
        own = [p for p in evaluation.prompts if (p.arm, p.temperature) == (one.arm, one.temperature)]
        assert sum(one.histogram) == sum(b.passes for b in one.by_context) == sum(p.passes for p in own)
        assert sum(n * count for n, count in enumerate(one.histogram, 1)) == sum(p.tokens for p in own)
        assert all(before.high <= after.low for before, after in pairwise(one.by_context))


def test_json(evaluation: Evaluation, config: EvalConfig, tiny_target: Target, tmp_path: Path) -> None:
    head = tmp_path / "train" / "key" / "head"
    head.mkdir(parents=True)
    line = {"step": 20, "val/simulated_accepted_length": 1.5}
    (head.parent / "metrics.jsonl").write_text(json.dumps({"step": 10, "loss": 1}) + "\n" + json.dumps(line) + '\n{"st')
    write_report(tmp_path / "eval", evaluation, tiny_target, str(head), config.model_dump(mode="json"))
    content = json.loads((tmp_path / "eval" / "report.json").read_text())
    jsonschema.validate(content, SCHEMA)
    assert content["rows"] == json.loads(json.dumps([asdict(row) for row in evaluation.rows]))
    assert content["target"]["fingerprint"] == tiny_target.spec.fingerprint
    assert content["training"] == [[20, 1.5]]
    assert {file.name for file in (tmp_path / "eval" / "plots").iterdir()} >= {"survival.svg", "survival.png"}
    assert "moon" not in json.dumps(content), "a published report carries no text"
    shown = json.loads((tmp_path / "eval" / "rejections.json").read_text())
    assert len(shown) == len(evaluation.rejections.kept) and "before" in shown[0]


def test_the_schema_is_strict(evaluation: Evaluation, tiny_target: Target, tmp_path: Path) -> None:
    content = json.loads(json.dumps(write_report(tmp_path, evaluation, tiny_target, None, {})))
    jsonschema.validate(content, SCHEMA)
    for spoilt in (
        content | {"schema": 1},
        content | {"extra": 1},
        content | {"rows": [content["rows"][0] | {"survival": [1.2]}]},
        content | {"rows": [{k: v for k, v in content["rows"][0].items() if k != "void"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, SCHEMA)


def test_no_log_no_curve(tmp_path: Path) -> None:
    assert training_curve(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert training_curve(tmp_path / "metrics.jsonl") is None


def test_markdown(evaluation: Evaluation, tiny_target: Target, tmp_path: Path) -> None:
    write_report(tmp_path, evaluation, tiny_target, "some/head", {"suite": "s"})
    text = (tmp_path / "report.md").read_text()
    for section in (
        "# Evaluation",
        "## By category",
        "## By mode",
        "## By prompt length",
        "## Acceptance by draft position",
        "## Limits",
        "## Why drafts were rejected (temperature 0)",
        "## Formulas",
    ):
        assert section in text.splitlines()
    tree = next(row for row in evaluation.rows if row.arm == "tree")
    line = next(line for line in text.splitlines() if line.startswith("| tree | 0 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "3" and cells[3].startswith(f"{tree.accepted_length:.2f} (")
    assert cells[4] == f"{tree.tokens_per_second:.1f}" and cells[5].startswith(f"{tree.speedup:.2f} (")
    assert cells[9] == "100%"
    for table in re.split(r"\n\n", text):  # every row of a table has as many cells as its header
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table


def test_a_category_cannot_break_the_table(evaluation: Evaluation, tiny_target: Target, tmp_path: Path) -> None:
    row = next(r for r in evaluation.rows if r.arm == "tree")
    odd = replace(evaluation, rows=[replace(row, category="a|b"), replace(row, category="all")])
    write_report(tmp_path, odd, tiny_target, None, {})
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert any(line.startswith(r"| tree | a\|b |") for line in lines)
