"""What a training holds in memory at its peak: one formula, for the plan and for the trainer.

    before + frozen head + batches + head and optimiser + activations + loss + work space

Sizes of tensors are exact. Four figures, `TOKEN` to `WORK_SPACE`, were fitted to the peaks of 26 real processes (CPU;
SmolLM2-135M, 1 to 7 steps of test-time training, V_d 1,024 to 32,000, 512 to 4,096 tokens at once, bfloat16 and
float32, AdamW and Muon): the formula was between 6 % too low and 6 % too high for them.
`tests/planning/test_memory_on_real_target.py` holds it against some of them. What ways of sharing hold is from
`scripts/bench_parallel.py`. On GPUs nothing of this was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sstf.losses.fused import TOKENS
from sstf.losses.teachers import CACHED
from sstf.targets import FrozenHead
from sstf.train.config import TrainConfig
from sstf.train.optim import takes_muon
from sstf.train.parallel import Kind

BATCHES = 4  # one in use, two loaded ahead, one being put together
# Bytes of activations for each input and output of a linear layer, of a row that is learned from: in all, and for each
# byte of a product's numbers.
TOKEN, TOKEN_PRODUCT = 1.75, 0.17
TAPS = 3  # copies of what `fc` reads
WORK_SPACE = 55 * 2**20  # of kernels and libraries (another on every processor), and what the C library keeps of freed

# What torch, the system and Python's threads say on CPUs, where torch has no class of its own for it.
_SAYINGS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "could not allocate",
    "bad_alloc",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


@dataclass(frozen=True)
class Part:
    """One thing that takes room."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Trained:
    """What is trained, and how: all that memory depends on except the sizes of micro-batch and chunk."""

    frozen: int  # bytes of the frozen head
    number: int  # bytes of one of its numbers, and of a feature's
    hidden: int
    taps: int  # features of a token
    parameters: int
    draft_vocab: int
    widths: int  # inputs and outputs of the linear layers that run in each step of test-time training
    moments: int  # numbers that the optimiser keeps
    averaged: bool
    bf16: bool
    unrolls: int
    supervised: float  # share of the tokens that are learned from
    kind: Kind = "single"
    processes: int = 1
    on_cpu: bool = True
    # It drafts with the target's lm_head: nothing of that size is learned. `whole` as it is, else with rows of it.
    frozen_output: bool = False
    whole: bool = False


def trained(
    head: nn.Module,
    frozen: FrozenHead,
    taps: int,
    unrolls: int,
    supervised: float,
    config: TrainConfig,
    device: torch.device,
) -> Trained:
    """A training in one process. Heads other than EAGLE's are taken to be like it: a layer that reads the taps runs
    once a batch, an `lm_head` (the target's, where the head has none) in the loss, and all others in each of `unrolls`
    steps.

    Args:
        head: may lie on the meta device.
        frozen: as `head`.
        taps: numbers of the target's features.
        unrolls: steps of test-time training.
        supervised: share of the tokens that are learned from.
        config: of the training.
        device: that will hold it.
    """
    layers = {name: layer for name, layer in head.named_modules() if isinstance(layer, nn.Linear)}
    output = next((layer for name, layer in layers.items() if name.split(".")[-1] == "lm_head"), None)
    tokens = sum(buffer.numel() for name, buffer in head.named_buffers() if name == "d2t")
    # Where the taps are one layer's, they are as wide as what other layers read, and all are counted.
    once = taps if taps != frozen.lm_head.shape[1] else 0
    inner = [
        layer
        for layer in layers.values()
        if layer is not output and layer.in_features != once and layer.out_features != tokens
    ]
    # A correction of the logits has a row for each token, which is learned beside the frozen ones.
    correction = any(layer.out_features == tokens for layer in layers.values())
    sizes = {name: p.numel() for name, p in head.named_parameters()}
    by_muon = [p.numel() for name, p in head.named_parameters() if takes_muon(name, p)]
    return Trained(
        frozen=frozen_bytes(frozen),
        number=frozen.lm_head.element_size(),
        hidden=frozen.lm_head.shape[1],
        taps=taps,
        parameters=sum(sizes.values()),
        # A head without an lm_head of its own drafts with the target's, over the vocabulary of its map.
        draft_vocab=output.out_features if output else sum(len(b) for n, b in head.named_buffers() if n == "d2t"),
        widths=sum(layer.in_features + layer.out_features for layer in inner),
        moments=2 * sum(sizes.values()) - (sum(by_muon) if config.optimizer.kind == "muon" else 0),
        averaged=config.ema is not None,
        bf16=config.precision == "bf16",
        unrolls=unrolls,
        supervised=supervised,
        on_cpu=device.type == "cpu",
        frozen_output=output is None and not correction,
        whole=tokens == len(frozen.lm_head),
    )


def frozen_bytes(frozen: FrozenHead) -> int:
    """Tensors of the frozen head; tied ones count once."""
    tensors: list[Tensor] = [frozen.embeddings, frozen.final_norm, *frozen.last_layer.values()]
    if frozen.lm_head is not frozen.embeddings:
        tensors.append(frozen.lm_head)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_parts(what: Trained, rows: int, loss_rows: int) -> list[Part]:
    """What a process holds at the peak of a step, without what it held before the training.

    Args:
        what: is trained.
        rows: tokens of a micro-batch.
        loss_rows: draft rows of a chunk of the loss.
    """
    product = 2 if what.bf16 else 4
    learned = rows * what.supervised
    each = what.unrolls * what.widths * (TOKEN + TOKEN_PRODUCT * product)
    activations = TAPS * rows * what.taps * product + learned * each
    parts = [
        Part("frozen head", what.frozen),
        Part("batches", BATCHES * rows * (what.taps + what.supervised * what.hidden) * what.number),
        Part("head and optimiser", _state(what)),
        Part("averaged weights", 4 * what.parameters if what.averaged else 0),
        Part("weights for products", 2 * what.parameters if what.bf16 else 0),
        Part(f"activations of {rows:,} tokens at once", activations),
        Part(f"loss, in chunks of {loss_rows} rows", _loss(what, learned, loss_rows, product)),
        Part("work space", WORK_SPACE),
    ]
    return [part for part in parts if part.bytes]


def _state(what: Trained) -> float:
    """Weights, gradients and the optimiser's numbers in float32, and what is gathered for a pass."""
    weights, moments, n = 4 * what.parameters, 4 * what.moments, what.processes
    match what.kind:
        case "zero1" | "zero2":
            return 2.25 * weights + (weights + moments) / n
        case "zero3":
            return 2.6 * weights + (2 * weights + moments) / n
        case "fsdp2":
            return 3 * weights + (weights + moments) / n
        case _:
            return 2 * weights + moments


def _loss(what: Trained, learned: float, loss_rows: int, product: int) -> float:
    """Of `losses.fused_distill`: a chunk's logits and blocks in cache; its teachers, which the steps of test-time
    training share; the draft weight's gradient, frozen rows and a product; and states with their gradients. Of a frozen
    draft weight rows alone, the head's and the teacher's, and its copy where products are in another type."""
    chunk = min(loss_rows, learned * what.unrolls)
    cached = min(chunk, torch.get_num_threads() * CACHED // max(1, what.draft_vocab) + 1) if what.on_cpu else chunk
    tables = chunk * product + 3 * 4 * cached + chunk / what.unrolls * (4 + what.number)
    layers: float = what.draft_vocab * (4 + what.number) + min(TOKENS, what.draft_vocab) * product
    if what.frozen_output:
        copied = 0 if what.whole else 2 * what.number
        layers = what.draft_vocab * (copied + (product if product != what.number else 0))
    return what.draft_vocab * tables + what.hidden * (layers + 2 * learned * what.unrolls * product)
