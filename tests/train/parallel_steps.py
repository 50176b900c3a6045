"""Steps of a tiny head under any `Parallel`, as a library and as what `accelerate launch` runs in each process.

As a program: `parallel_steps.py STORE BEGUN OUT NAME=ENVIRONMENT...`, where BEGUN is a state that another run saved and
ENVIRONMENT a JSON file of what a launcher sets for that kind; without it (`NAME=`), what it did set.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_store import METHOD
from torch import Tensor

from sstf.features import FeatureStore
from sstf.methods import Eagle3Method
from sstf.train.feed import unsupervised
from sstf.train.module import HeadWithLoss
from sstf.train.optim import AdamWConfig, build_optimizers
from sstf.train.parallel import Parallel, close_launch, open_launch, open_parallel
from sstf.types import FeatureBatch

MICRO = 6  # micro-batches a step, over all processes
CLIP = 0.5
# Adam divides by sqrt(v) + eps: with the usual 1e-8, rounding shows at first wherever a gradient is near zero.
ADAMW = AdamWConfig(learning_rate=2e-3, weight_decay=0.1, eps=1e-5)


@dataclass
class Bench:
    """A head on its way, and what it saw."""

    store: FeatureStore
    module: HeadWithLoss
    parallel: Parallel
    figures: list[list[float]]

    @staticmethod
    def open(store: FeatureStore, environment: dict[str, str], seed: int = 0, precision: str = "fp32") -> Bench:
        launch = open_launch(environment)
        frozen = store.frozen_head()
        torch.manual_seed(seed)
        head = Eagle3Method(METHOD).build_head(store.target, frozen, torch.arange(50, 250))
        module = HeadWithLoss(Eagle3Method(METHOD), head, frozen, precision)
        parallel = open_parallel(launch, module, lambda named: build_optimizers(ADAMW, named))
        return Bench(store, module, parallel, [])

    def batches(self, step: int, parts: int = MICRO) -> list[FeatureBatch]:
        """This process's micro-batches of a step of six conversations in `parts` micro-batches."""
        launch = self.parallel.launch
        ids = [(MICRO * step + i) % len(self.store.ids) for i in range(MICRO)]
        dealt = [ids[i::parts] for i in range(parts)]
        return [self.store.batch(part) for part in dealt[launch.rank :: launch.processes]]

    def step(self, step: int, parts: int = MICRO) -> None:
        self.parallel.set_lr(1 - step / 20)
        mine = self.batches(step, parts)
        outputs = [self.parallel.backward(batch, batch is mine[-1]) for batch in mine]
        assert not any(output.loss.requires_grad for output in outputs)
        sums = self.parallel.launch.reduce(sum(torch.stack([o.valid, o.losses]) for o in outputs))  # type: ignore[arg-type]
        norm = self.parallel.step(1 / float(sums[0, 0]), CLIP)
        self.figures.append([*(sums[1] / sums[0]).tolist(), norm])

    def steps(self, first: int, last: int, parts: int = MICRO) -> None:
        for step in range(first, last):
            self.step(step, parts)

    def held_out(self) -> list[float]:
        """Mean losses of the same batch in every process."""
        launch = self.parallel.launch
        output = self.parallel.evaluate(self.store.batch([1, 2, 3]))
        sums = launch.reduce(torch.stack([output.valid, output.losses]))
        return (sums[1] / sums[0]).tolist()  # type: ignore[no-any-return]

    def poisoned(self) -> float:
        """The norm of a step of which one process's features are not numbers."""
        for batch in (mine := self.batches(0)):
            spoil = float("nan") if self.parallel.launch.is_main else 1.0
            self.parallel.backward(replace(batch, features=batch.features * spoil), batch is mine[-1])
        return self.parallel.step(0.1, CLIP)

    def forgotten(self) -> None:
        """Gradients that are finite, and dropped."""
        for batch in (mine := self.batches(0)):
            self.parallel.backward(batch, batch is mine[-1])
        self.parallel.forget()

    def lopsided(self) -> None:
        """A step of which only the main process's share has anything to learn from."""
        self.parallel.set_lr(1.0)
        mine = self.batches(4)
        if not self.parallel.launch.is_main:
            mine = [unsupervised(batch) for batch in mine]
        outputs = [self.parallel.backward(batch, batch is mine[-1]) for batch in mine]
        valid = self.parallel.launch.reduce(torch.stack([o.valid[0] for o in outputs]).sum())
        self.parallel.step(1 / float(valid), CLIP)

    def flat_state(self) -> dict[str, Tensor]:
        head, optimizer = self.parallel.state()
        return {f"head/{k}": v for k, v in head.items()} | {f"optimizer/{k}": v for k, v in optimizer.items()}

    def load(self, flat: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "optimizer": {}}
        for key, value in flat.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self.parallel.load(parts["head"], parts["optimizer"])


def one_kind(store: FeatureStore, begun: dict[str, Tensor], environment: dict[str, str]) -> dict[str, Any]:
    """Everything that a kind must be able to do; tensors and figures for the test to compare."""
    bench = Bench.open(store, environment)
    main = bench.parallel.launch.is_main
    facts = bench.parallel.launch.facts()
    fresh = bench.flat_state()
    bench.steps(0, 4)
    held_out = bench.held_out()
    four = bench.flat_state()
    assert bool(four) == main
    with bench.parallel.whole_head() as head:
        assert (head is not None) == main
        if head is not None:
            assert head.state_dict().keys() == {k.removeprefix("head/") for k in four if k.startswith("head/")}
            assert all(torch.equal(value, four[f"head/{k}"]) for k, value in head.state_dict().items())
            whole = HeadWithLoss(bench.module.method, head, bench.module.frozen, "fp32")
            alone = whole(store.batch([1, 2, 3]))
            torch.testing.assert_close((alone.losses / alone.valid).tolist(), held_out)
    norm = bench.poisoned()
    after = bench.flat_state()
    bench.forgotten()
    last = bench.flat_state()
    unmoved = all(torch.equal(after[k], four[k]) and torch.equal(last[k], four[k]) for k in four)
    bench.lopsided()

    resumed = Bench.open(store, environment, seed=1)
    resumed.load(begun)
    loaded = resumed.flat_state()
    resumed.steps(4, 8)
    bf16 = Bench.open(store, environment, precision="bf16")
    bf16.steps(0, 2)
    figures = {
        "facts": facts,
        "figures": bench.figures + resumed.figures,
        "bf16": bf16.figures,
        "held_out": held_out,
        "poisoned": [norm == norm and abs(norm) != float("inf"), unmoved],
    }
    return {
        "figures": figures,
        "fresh": fresh,
        "four": four,
        "lopsided": bench.flat_state(),
        "loaded": loaded,
        "eight": resumed.flat_state(),
    }


def main() -> None:
    torch.set_num_threads(1)
    store, begun, out = FeatureStore(Path(sys.argv[1])), load_file(sys.argv[2]), Path(sys.argv[3])
    own = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_WORLD_SIZE")}
    for job in sys.argv[4:]:
        kind, file = job.split("=", 1)
        environment = json.loads(Path(file).read_text(encoding="utf-8")) if file else dict(os.environ)
        results = one_kind(store, begun, environment | own)
        if own["RANK"] != "0":
            continue
        (out / f"{kind}.json").write_text(json.dumps(results.pop("figures")), encoding="utf-8")
        for name, tensors in results.items():
            save_file(tensors, out / f"{kind}-{name}.safetensors")
    close_launch()


if __name__ == "__main__":
    main()
