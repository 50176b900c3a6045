"""What a training takes is known before, is chosen to fit, and shrinks where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_store import make_store, make_trainer, metrics, train_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sstf import machine
from sstf.data.progress import NoProgress
from sstf.errors import ConfigError
from sstf.features import FeatureStore
from sstf.losses.fused import TOKENS
from sstf.machine import memory_left
from sstf.targets import Target
from sstf.train import budget
from sstf.train.budget import GRAIN, LEAST_LOSS_ROWS, MARGIN, USEFUL_ON_CPU, Sizes, choose, free_memory, need
from sstf.train.checkpoint import list_checkpoints, read_checkpoint
from sstf.train.config import TrainConfig
from sstf.train.memory import Trained, is_out_of_memory, peak_parts
from sstf.train.parallel import Kind, Launch
from sstf.types import TokenSample

MIB = 2**20
# SmolLM2-135M's EAGLE-3 head: 5.1 million weights in the body, and a draft vocabulary of 8,192.
HEAD = Trained(
    frozen=61 * MIB,
    number=2,
    hidden=576,
    taps=3 * 576,
    parameters=9_808_128,
    draft_vocab=8192,
    widths=11_904,
    moments=2 * 9_808_128,
    averaged=False,
    bf16=True,
    unrolls=3,
    supervised=0.8,
)
LARGE = replace(HEAD, draft_vocab=32_000, parameters=23_521_536, moments=2 * 23_521_536)
M = 4.0 * HEAD.parameters


def parts(what: Trained, rows: int = 1024, loss_rows: int = 512) -> dict[str, float]:
    return {part.name.split(",")[0]: part.bytes for part in peak_parts(what, rows, loss_rows)}


def peak(what: Trained, rows: int = 1024, loss_rows: int = 512) -> float:
    return need(what, Sizes(rows, loss_rows))


def test_the_sizes_of_tensors_by_hand() -> None:
    found = parts(HEAD)
    assert found["frozen head"] == 61 * MIB
    assert found["head and optimiser"] == 4 * M
    assert found["weights for products"] == M / 2
    # Four batches of 1,024 tokens with 3 x 576 features and, for 80 % of them, 576 of the teacher.
    assert found["batches"] == pytest.approx(4 * 1024 * (3 * 576 + 0.8 * 576) * 2)
    # Muon keeps one number a weight of the body.
    muon = replace(HEAD, moments=2 * 9_808_128 - 5_000_000)
    assert found["head and optimiser"] - parts(muon)["head and optimiser"] == 4 * 5_000_000
    assert parts(replace(HEAD, averaged=True))["averaged weights"] == M


def test_logits_count_once_a_chunk() -> None:
    saved = parts(LARGE)["loss"] - parts(LARGE, loss_rows=128)["loss"]
    # 384 rows of bfloat16 logits; 128 teacher rows, as bfloat16 logits and as float32.
    assert saved == pytest.approx(32_000 * (384 * 2 + 128 * 6), rel=0.01)


def test_what_is_not_learned_of_a_frozen_lm_head() -> None:
    """A head's own lm_head has 4 bytes of gradient, a copy of the target's rows and a product of 2,048 tokens. The
    target's has nothing of it; where some of its rows are taken the head's and the teacher's, in float32 a converted
    copy."""
    own, frozen = parts(LARGE)["loss"], replace(LARGE, frozen_output=True, whole=True)
    assert own - parts(frozen)["loss"] == pytest.approx(576 * (32_000 * 6 + TOKENS * 2))
    some = replace(frozen, whole=False)
    assert parts(some)["loss"] - parts(frozen)["loss"] == pytest.approx(576 * 32_000 * 2 * 2)
    wide = parts(replace(frozen, bf16=False))["loss"] - parts(replace(LARGE, bf16=False))["loss"]
    assert wide == pytest.approx(576 * (32_000 * (4 - 6) - TOKENS * 4))


def test_more_of_anything_takes_more() -> None:
    for change in (
        {"unrolls": 7},
        {"bf16": False},
        {"supervised": 1.0},
        {"averaged": True},
        {"draft_vocab": 32_000},
        {"frozen": 90 * MIB},
    ):
        assert peak(replace(HEAD, **change)) > peak(HEAD), change  # type: ignore[arg-type]
    assert peak(HEAD, rows=2048) > peak(HEAD) > peak(HEAD, loss_rows=64)


@pytest.mark.parametrize(
    ("kind", "processes", "multiple"),
    [
        ("single", 1, 4.1), ("ddp", 4, 4.1), ("zero1", 4, 3.1), ("zero2", 4, 3.0), ("zero3", 4, 3.6),
        ("fsdp2", 4, 3.8), ("ddp", 2, 4.1), ("zero2", 2, 3.8), ("zero3", 2, 4.8), ("fsdp2", 2, 4.6),
    ],
)  # fmt: skip
def test_ways_of_sharing_hold_what_was_measured(kind: Kind, processes: int, multiple: float) -> None:
    """In M, the weights; from `docs/multi-gpu.md`, a head of 67 million weights in float32 and short steps."""
    found = parts(replace(HEAD, kind=kind, processes=processes))["head and optimiser"] / M
    assert found == pytest.approx(multiple, abs=0.25)


# ---- choosing --------------------------------------------------------------------------------------------------------


def config(step_tokens: int, batch_tokens: int | str = "auto") -> TrainConfig:
    return TrainConfig.model_validate({"steps": 1, "step_tokens": step_tokens, "batch_tokens": batch_tokens})


def chosen(what: Trained, step_tokens: int, free: float, most: int | None = None) -> Sizes:
    return choose(what, 300, config(step_tokens), 512, free, most).sizes


def just(what: Trained, sizes: Sizes) -> float:
    """Free memory into which these sizes fit, and nothing larger."""
    return need(what, sizes) / (1 - MARGIN)


def test_as_much_at_once_as_fits() -> None:
    assert chosen(HEAD, 1024, 100e9) == Sizes(1024, 512)
    assert chosen(HEAD, 65_536, 100e9) == Sizes(USEFUL_ON_CPU, 512)
    assert chosen(replace(HEAD, on_cpu=False), 65_536, 100e9) == Sizes(65_536, 512)
    # A conversation is never cut.
    assert choose(HEAD, 5000, config(1024), 512, 100e9).sizes.rows == 5000
    # Of four processes each gets a quarter, and at most a conversation more.
    four = replace(HEAD, kind="ddp", processes=4, on_cpu=False)
    assert chosen(four, 8192, 100e9) == Sizes(2048 + 300, 512)


def test_the_largest_that_fits_is_taken() -> None:
    free = just(HEAD, Sizes(1000, 512))
    found = chosen(HEAD, 2048, free)
    assert 1000 - GRAIN < found.rows <= 1000 and found.loss_rows == 512
    assert need(HEAD, found) <= (1 - MARGIN) * free < need(HEAD, replace(found, rows=found.rows + GRAIN))


def test_then_the_chunk_shrinks_then_nothing_is_left() -> None:
    assert chosen(LARGE, 2048, just(LARGE, Sizes(300, 128)) + 1) == Sizes(300, 128)
    least = just(LARGE, Sizes(300, LEAST_LOSS_ROWS))
    with pytest.raises(ConfigError, match=r"its longest conversation of 300 tokens alone, 0\.\d\d GiB are free; lower"):
        chosen(LARGE, 2048, least - 100)


def test_a_size_that_was_asked_for_is_taken() -> None:
    found = choose(HEAD, 300, config(2048, 900), 512, 1.0)
    assert found.sizes == Sizes(900, 512)
    assert found.need == need(HEAD, Sizes(900, 512))
    assert choose(HEAD, 300, config(500, 900), 512, 1.0).need == need(HEAD, Sizes(500, 512))


def test_going_on_computes_as_much_at_once_as_before() -> None:
    assert chosen(HEAD, 2048, 100e9, most=700) == Sizes(700, 512)
    assert chosen(HEAD, 2048, just(HEAD, Sizes(500, 512)), most=700).rows <= 500


def test_all_processes_choose_by_the_one_that_has_least(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Launch):
        def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.tensor([0.0, 5.0 * MIB], dtype=tensor.dtype)

    monkeypatch.setattr(budget, "memory_left", lambda device: 800 * MIB)
    assert free_memory(Two("ddp", 2, 0, torch.device("cpu"), "gloo", 1)) == 5 * MIB
    # Those of one machine share what is left there.
    assert free_memory(Launch("single", 1, 0, torch.device("cpu"), None, 1)) == 800 * MIB


def test_what_is_left_is_what_the_system_says() -> None:
    left = memory_left(torch.device("cpu"))
    assert 0 < left <= machine.device_memory(torch.device("cpu"))


# ---- in the trainer --------------------------------------------------------------------------------------------------


def test_what_was_chosen_is_said_and_kept(store: FeatureStore, tmp_path: Path) -> None:
    said: list[str] = []

    class Bars(NoProgress):
        def note(self, text: str) -> None:
            said.append(text)

    trainer = make_trainer(store, tmp_path, train_config(steps=2, checkpoint_every=1))
    summary = trainer.run(Bars(), "tiny", {})
    assert said[0] == str(trainer.budget)
    assert "free, in micro-batches of up to 64 tokens and loss chunks of 512 rows" in said[0]
    assert (summary["micro_batch_tokens"], summary["loss_rows"]) == (64, 512)
    progress = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).progress
    assert (progress.batch_tokens, progress.loss_rows) == (64, 512)


def test_too_little_memory_is_known_before(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "memory_left", lambda device: 8 * MIB)
    with pytest.raises(ConfigError, match=r"lower data.max_length, method.ttt_steps or method.draft_vocab_size"):
        make_trainer(store, tmp_path)
    # Who asks for a size is believed.
    assert make_trainer(store, tmp_path, train_config(batch_tokens=32)).feed.batch_tokens == 32


# ---- running out -----------------------------------------------------------------------------------------------------


# Limits are such that a table of logits is refused while all that is small finds room: where memory ends in the middle
# of small things, libraries below abort.


@pytest.fixture(scope="module")
def long_store(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 conversations of 502 tokens, all learned from over a draft vocabulary of 32,768: 64 MiB of logits a step of
    test-time training and conversation, and little else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32768, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    target = Target("long", LlamaForCausalLM(config), PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
    rows = torch.randint(3, 32768, (16, 502)).tolist()
    samples = [TokenSample(f"c{i}", ids, [False] * 2 + [True] * 500) for i, ids in enumerate(rows)]
    folder = tmp_path_factory.mktemp("long")
    make_store(target, samples, folder)
    return folder


def scarce(
    store: Path, folder: Path, left: int | None, loss_rows: int, least: int = 32, **config: Any
) -> dict[str, Any]:
    """What `scarce_memory.py` prints."""
    asked = {"left": left, "loss_rows": loss_rows, "least": least, "config": {"steps": 2, "precision": "fp32"} | config}
    program = str(Path(__file__).parent / "scarce_memory.py")
    command = [sys.executable, program, str(store), str(folder), json.dumps(asked)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    out: dict[str, Any] = json.loads(ended.stdout)
    return out


def assert_same_curve(one: Path, other: Path) -> None:
    found, expected = metrics(one), metrics(other)
    assert len(found) == len(expected) == 2
    for row, reference in zip(found, expected, strict=True):
        losses = {name: value for name, value in row.items() if name.startswith(("train/", "grad_norm"))}
        assert losses == pytest.approx({name: reference[name] for name in losses}, rel=1e-5, abs=1e-6)


needs_rlimit = pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory is Linux's")


@pytest.mark.slow
@needs_rlimit
def test_micro_batches_are_halved_until_they_fit(long_store: Path, tmp_path: Path) -> None:
    """The logits of 2,000 tokens take 750 MiB, those of 1,000 and what makes their teachers 640."""
    step = {"step_tokens": 2000, "batch_tokens": 2000}
    found = scarce(long_store, tmp_path / "scarce", left=730, loss_rows=100_000, **step)
    assert found["steps"] == 2 and found["error"] is None
    assert found["tokens"] in (1000, 500) and found["loss_rows"] == 100_000  # holes in the heap may cost a halving
    assert "step 0: out of memory with 2000 tokens at once; from here on 1000" in found["said"]
    free = scarce(long_store, tmp_path / "free", left=None, loss_rows=512, step_tokens=2000, batch_tokens=500)
    assert not any("out of memory" in line for line in free["said"])
    assert_same_curve(tmp_path / "scarce", tmp_path / "free")


@pytest.mark.slow
@needs_rlimit
def test_then_the_chunk_of_the_loss_is_halved(long_store: Path, tmp_path: Path) -> None:
    """1,500 rows of logits take 188 MiB, 1,024 and their teachers 170, 512 and theirs 85."""
    step = {"step_tokens": 500, "batch_tokens": 500}
    found = scarce(long_store, tmp_path / "scarce", left=150, loss_rows=2048, **step)
    assert found["steps"] == 2 and found["error"] is None
    assert found["tokens"] == 500 and found["loss_rows"] in (512, 256)
    assert any("a conversation of 500 tokens alone; from here on loss chunks of 1024" in s for s in found["said"])
    scarce(long_store, tmp_path / "free", left=None, loss_rows=2048, **step)
    assert_same_curve(tmp_path / "scarce", tmp_path / "free")


@pytest.mark.slow
@needs_rlimit
def test_when_nothing_is_left_to_lower_it_says_so(long_store: Path, tmp_path: Path) -> None:
    found = scarce(long_store, tmp_path, left=100, loss_rows=2048, least=1024, step_tokens=500, batch_tokens=500)
    assert found["steps"] == 0
    assert found["error"] is not None
    assert found["error"].startswith(
        "step 0: memory is too short for 500 tokens at once; set data.max_length below 500"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 133370 bytes from file <shard>: Cannot allocate memory (12)"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_running_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
