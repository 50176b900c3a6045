"""The choice by hand, and the measurements against what the decoder itself reaches."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sstf.cli import main
from sstf.data.progress import NoProgress
from sstf.decode import CostModel, SpeculativeDecoder
from sstf.decode.cost import KNOTS
from sstf.errors import ConfigError
from sstf.methods import Eagle3Config, TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead
from sstf.targets import Target
from sstf.trees import Chain
from sstf.tune import Choice, Measured, TuneConfig, TunePlan, launch_lines, measure, plan, write_plan
from sstf.tune.plan import PLAIN, SeenTree, Shape, accepted_lengths
from sstf.tune.report import schedule
from sstf.types import DraftTree


def cost(slope: float, draft: float = 0.1) -> CostModel:
    """1 s for a pass of one row, and `slope` more for each further row."""
    return CostModel([1 + slope * (rows - 1) for rows in KNOTS], draft, 0.0)


def seen(emitted: list[int]) -> SeenTree:
    #   root -> 5 (0.6) -> 7 (0.9) -> 9 (0.5)
    #        -> 6 (0.3) -> 8 (0.5)
    tokens, parents = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([-1, -1, 0, 1, 2])
    return SeenTree.of(DraftTree(tokens, parents, torch.tensor([0.6, 0.3, 0.9, 0.5, 0.5])), emitted)


def test_a_tree_by_hand() -> None:
    one = seen([6, 8, 1])
    assert one.depths == [1, 1, 2, 2, 3]
    assert one.ranks == [0, 1, 0, 0, 0]
    assert one.scores == pytest.approx([0.6, 0.3, 0.54, 0.15, 0.27])
    assert one.accepted == [1, 3]


def test_sub_trees_by_hand() -> None:
    """In the order of their scores: 5, 7, 6, 9, 8."""
    one = seen([6, 8, 1])
    assert [one.accepts(Shape(3, 2, nodes)) for nodes in (2, 3, 4, 5)] == [0, 1, 1, 2]
    assert one.accepts(Shape(1, 2, 5)) == 1, "one level"
    assert one.accepts(Shape(3, 1, 5)) == 0, "only the best child"
    deep = seen([5, 7, 9, 2])
    assert [deep.accepts(Shape(3, 2, nodes)) for nodes in (1, 2, 3, 4)] == [1, 2, 2, 3]
    assert seen([3]).accepts(Shape(3, 2, 5)) == 0


def test_accepted_lengths_by_hand() -> None:
    found = accepted_lengths([0.5, 0.25], [seen([6, 8, 1]), seen([5, 7, 9, 2])])
    assert (found[PLAIN], found[Shape(1, 1, 1)], found[Shape(2, 1, 2)]) == (1.0, 1.5, 1.75)
    assert found[Shape(3, 2, 5)] == 1 + (2 + 3) / 2
    assert found[Shape(2, 2, 3)] == 1 + (1 + 2) / 2


def test_the_best_of_each_batch_and_where_it_breaks_even() -> None:
    lengths = {PLAIN: 1.0, Shape(1, 1, 1): 1.5, Shape(3, 1, 3): 2.0, Shape(3, 2, 7): 2.6}
    found = plan(Measured(lengths, {(1, 128): cost(0.0), (2, 128): cost(0.2), (4, 128): cost(1.0)}))
    # Rows that cost nothing: 2.6 / 1.3 against 2.0 / 1.3 and 1.5 / 1.1
    assert found.trees[0] == Choice(1, 128, Shape(3, 2, 7), 2.6, pytest.approx(2.0))
    assert found.chains[0].shape == Shape(3, 1, 3) and found.chains[0].speedup == pytest.approx(2 / 1.3)
    # 1.5 / 1.3 beats 2.0 / 1.9 and 2.6 / 2.7
    assert found.chains[1] == found.trees[1] == Choice(2, 128, Shape(1, 1, 1), 1.5, pytest.approx(1.5 / 1.3))
    assert found.chains[2] == Choice(4, 128, PLAIN, 1.0, 1.0)
    assert found.break_even == {128: 2}
    # Geometric means of chains: depth 1 (1.364 · 1.154 · 0.714) = 1.12, depth 3 (1.538 · 1.053 · 0.465) < 1
    assert found.one_chain == Shape(1, 1, 1)


def test_nothing_pays() -> None:
    found = plan(Measured({PLAIN: 1.0, Shape(1, 1, 1): 1.1}, {(1, 64): cost(1.0), (8, 64): cost(2.0)}))
    assert found.break_even == {64: 0} and found.one_chain == found.one_tree == PLAIN
    vllm, sglang = launch_lines(found, "org/model", "head", "eagle3")
    assert vllm.startswith("vllm serve org/model  #") and "speculative" not in vllm + sglang


def chosen(*depths: int) -> list[Choice]:
    return [Choice(2**i, 128, Shape(d, 1, d) if d else PLAIN, 1.0, 1.0) for i, d in enumerate(depths)]


def test_launch_lines() -> None:
    found = TunePlan(chosen(4, 2, 2, 0), chosen(4, 2, 2, 0), Shape(2, 1, 2), Shape(3, 4, 15), {128: 4})
    export, vllm, _, sglang = launch_lines(found, "org/my model", "runs/a head", "eagle3")
    assert export == "sstf export 'runs/a head' --to vllm"
    words = shlex.split(vllm)
    assert words[:4] == ["vllm", "serve", "org/my model", "--speculative-config"]
    assert json.loads(words[4]) == {
        "method": "eagle3",
        "model": "runs/a head-vllm",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 1, 4], [2, 4, 2], [5, 8, 0]],
    }
    words = shlex.split(sglang)
    assert words[words.index("--speculative-num-steps") + 1] == "3"
    assert words[words.index("--speculative-eagle-topk") + 1] == "4"
    assert words[words.index("--speculative-num-draft-tokens") + 1] == "16", "the root among them"


def test_one_depth_needs_no_schedule() -> None:
    found = TunePlan(chosen(3, 3), chosen(3, 3), Shape(3, 1, 3), Shape(3, 1, 3), {128: 2})
    assert "per_batch_size" not in launch_lines(found, "m", "h", "eagle3")[1]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=8))
def test_a_schedule_covers_every_size_once(depths: list[int]) -> None:
    """As vLLM wants it: from 1, ascending, without overlap; each measured size gets its own depth."""
    ranges = schedule(chosen(*depths))
    assert ranges[0][0] == 1 and ranges[-1][1] == 2 ** (len(depths) - 1)
    assert all(low[1] + 1 == high[0] and low[2] != high[2] for low, high in pairwise(ranges))
    for i, depth in enumerate(depths):
        assert [d for first, last, d in ranges if first <= 2**i <= last] == [depth]


@pytest.fixture(scope="module")
def head(tiny_target: Target) -> DraftHead:
    method = build_method(Eagle3Config(draft_vocab_size=300))
    assert isinstance(method, TrainableMethod)
    torch.manual_seed(0)
    module = method.build_head(tiny_target.spec, tiny_target.frozen_head, torch.arange(300))
    return DraftHead("untrained", method, module.eval().requires_grad_(False))


def test_measured_on_the_tiny_target(tiny_target: Target, head: DraftHead, tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"prompt": "Hi"}\n{"prompt": "moon moon"}\n')
    config = TuneConfig(suite=str(suite), max_new_tokens=24, batches=(1, 2), contexts=(32,), repeats=1)
    measured = measure(tiny_target, head, config, NoProgress())
    assert set(measured.costs) == {(1, 32), (2, 32)}
    assert all(cost.plain_host_s > 0 for cost in measured.costs.values())
    lengths = measured.accepted_lengths
    # A chain of 2 decodes the same text: its passes lie elsewhere in it, so about as many tokens are accepted.
    prompt = tiny_target.tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    direct = SpeculativeDecoder(tiny_target, head, Chain(depth=2)).generate(prompt, 24)
    assert 1 < lengths[Shape(2, 1, 2)] <= 3 and abs(lengths[Shape(2, 1, 2)] - direct.accepted_length) < 0.8
    deepest = max(shape.depth for shape in lengths if shape.width > 1)
    growing = [lengths[Shape(deepest, 8, nodes)] for nodes in (7, 15, 63)]
    assert growing == sorted(growing) and 1 < growing[-1] <= deepest + 1
    assert lengths[Shape(deepest, 8, 63)] >= lengths[Shape(deepest, 2, 63)]
    found = plan(measured)
    shown = write_plan(tmp_path, found, measured, launch_lines(found, "m", "h", "eagle3"), print)
    assert shown == tmp_path / "tune.png" and shown.is_file()
    content = json.loads((tmp_path / "tune.json").read_text())
    assert content["format"] == 1 and len(content["chains"]) == 2
    assert ElementTree.fromstring((tmp_path / "tune.svg").read_text()).tag.endswith("svg")


@pytest.mark.parametrize(("field", "value"), [("batches", (0,)), ("contexts", (1,)), ("contexts", (255,))])
def test_what_cannot_be_measured(tiny_target: Target, head: DraftHead, field: str, value: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{field} is"):
        measure(tiny_target, head, TuneConfig.model_validate({field: value}), NoProgress())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "no head there"),
        (["nowhere", "batchs=[1]"], "batchs"),
        (["nowhere", "batches=none"], "batches"),
        (["nowhere", "prompts=0"], "prompts"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments])
    assert ended.value.code == 2
    found = capsys.readouterr().err
    assert expected in found and "Traceback" not in found
