"""The arithmetic of one EAGLE-3 training step, counted from shapes, and how fast this machine does such arithmetic."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from sstf.targets import TargetSpec

PARTS = 3  # target layers that are read
SQUARE = 2048  # rows and columns of the large product
TIMED = 5  # repeats; the median counts


@dataclass(frozen=True)
class Product:
    """`times` products of [rows, inner] with [inner, columns] in a step."""

    rows: int
    inner: int
    columns: int
    times: int

    @property
    def mflop(self) -> float:
        return 2 * self.rows * self.inner * self.columns * self.times / 1e6


def products(
    spec: TargetSpec, ttt_steps: int, draft_vocab: int, rows: int, supervised: float, lm_head_trained: bool = True
) -> list[Product]:
    """Matrix products with weights in one step over `rows` positions.

    A weight [in, out] takes one product forward and two backward (for its input and for itself), each of
    2 * rows * in * out operations; fc has no gradient for its input, which the target gave, and it runs once.
    In each of the test-time-training steps, with H hidden, D head_dim, I intermediate:

        q, k, v   2H -> (heads + 2 kv_heads) D          mlp       3 times H * I
        o         heads D -> H                           lm_head   H -> draft_vocab, supervised positions alone

    The teacher's logits are one product H -> draft_vocab for each supervised position, forward, once for all steps.
    A trainer that computes more (positions without supervision, the teacher of every step) is not credited for it.
    """
    hidden, width = spec.hidden_size, spec.num_heads * spec.head_dim
    taught = round(rows * supervised)
    each = [
        Product(rows, 2 * hidden, width + 2 * spec.num_kv_heads * spec.head_dim, 3 * ttt_steps),
        Product(rows, width, hidden, 3 * ttt_steps),
        Product(rows, hidden, spec.intermediate_size, 3 * 3 * ttt_steps),
        Product(taught, hidden, draft_vocab, (3 if lm_head_trained else 2) * ttt_steps),
    ]
    return [Product(rows, PARTS * hidden, hidden, 2), *each, Product(taught, hidden, draft_vocab, 1)]


def attention_mflop(spec: TargetSpec, ttt_steps: int, rows: int) -> float:
    """Attention of one step over a document of `rows`, forward and twice that backward, without recomputation.

    A query and a key, and their weight and a value, take 2 * heads * head_dim operations each. At step i a position
    sees (rows + 1) / 2 keys of step 0 in the mean and i of its own.
    """
    keys = sum((rows + 1) / 2 + i for i in range(ttt_steps))
    return 3 * 4 * spec.num_heads * spec.head_dim * rows * keys / 1e6


def mflop_per_token(
    spec: TargetSpec, ttt_steps: int, draft_vocab: int, rows: int, supervised: float, lm_head_trained: bool = True
) -> float:
    """What training must compute for one token, in millions of operations: `products` and `attention_mflop`."""
    of_weights = products(spec, ttt_steps, draft_vocab, rows, supervised, lm_head_trained)
    return (sum(p.mflop for p in of_weights) + attention_mflop(spec, ttt_steps, rows)) / rows


def roofline(
    spec: TargetSpec, ttt_steps: int, draft_vocab: int, rows: int, supervised: float, threads: int
) -> tuple[float, float]:
    """GFLOP/s of bare bf16 products: all of a step's `products` together, and one large square product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of_step = products(spec, ttt_steps, draft_vocab, rows, supervised)
        seconds = sum(_seconds(p.rows, p.inner, p.columns) * p.times for p in of_step)
        square = 2 * SQUARE**3 / 1e9 / _seconds(SQUARE, SQUARE, SQUARE)
    finally:
        torch.set_num_threads(before)
    return round(sum(p.mflop for p in of_step) / 1000 / seconds, 1), round(square, 1)


def _seconds(rows: int, inner: int, columns: int) -> float:
    """Median time of [rows, inner] @ [inner, columns] in bfloat16."""
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    times = []
    for _ in range(TIMED + 1):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
