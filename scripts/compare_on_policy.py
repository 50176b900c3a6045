"""What rollouts are worth: a trained head, trained further with `on_policy`, or for as many tokens as before.

    python scripts/compare_on_policy.py CONFIG [--max-new-tokens 128] [--temperature 0] [key.sub=value ...]

CONFIG has a section `on_policy`, and stored features. The head of its training goes on in three ways: with the phase
as it is set; on the same kind of rollouts without the reverse KL (`on_policy.weight=0`); and on the conversations that
it was trained on, with the same learning rate, for as many tokens as the phase took. Each keeps its best head on
held-out conversations, the one that it began with among them. Then all decode the prompts of these conversations, in
chains as deep as the method is taught.

Prints a JSON line for each arm: tokens and seconds of the additional training (rollouts and features included),
accepted length with a 95 % interval over prompts, and its difference from the ordinary arm, prompts paired. What is
done is not done again; heads are in the run's folder, those of the ordinary arm in `compare_on_policy/`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sstf.data.atomic import write_json_atomic
from sstf.decode import SpeculativeDecoder
from sstf.errors import ConfigError
from sstf.evaluation.metrics import bootstrap
from sstf.features import FeatureStore, prompt_of, split
from sstf.methods import TrainableMethod
from sstf.methods.checkpoint import load_head
from sstf.pipeline import Run, load_run
from sstf.progress_display import display
from sstf.targets import Target
from sstf.train.trainer import Trainer
from sstf.trees import Chain


def phase(run: Run) -> dict[str, Any]:
    """Tokens and seconds of a run's second phase, which is done if need be."""
    times = run.folder("on_policy") / "compared.json"
    run.up_to("train")
    if not times.exists():
        started = time.perf_counter()
        run.up_to("on_policy")
        write_json_atomic(times, {"seconds": round(time.perf_counter() - started, 1)})
    summary = run.summary("on_policy") or {}
    tokens = sum(one["trained_tokens"] for one in summary["rounds"])
    return {"head": run.head, "tokens": tokens, **json.loads(times.read_text(encoding="utf-8"))}


def ordinary(run: Run, tokens: int, console: Console) -> dict[str, Any]:
    """The training before, gone on with for about so many tokens."""
    config, method, settings = run.config, run.method, run.config.on_policy
    assert settings and isinstance(method, TrainableMethod)
    store = FeatureStore(run.folder("extract"))
    head = run.folder("train") / "head"
    folder = config.folder / "compare_on_policy" / f"{run.keys['on_policy']}-{tokens}"
    most = settings.rounds * settings.steps

    def trainer(steps: int) -> Trainer:
        how = settings.training(config.train, head).model_copy(update={"steps": steps})
        return Trainer(store, method, config.method, how, folder, config.seed)

    # Steps differ in tokens: whole conversations fill them.
    plan, steps, planned = trainer(4 * most).plan, 0, 0
    while planned < tokens and steps < len(plan):
        planned += sum(store.lengths[i] for i in plan[steps])
        steps += 1
    done = folder / "compared.json"
    if not done.exists():
        started = time.perf_counter()
        summary = trainer(steps).run(display(console), "ordinary", config.model_dump(mode="json"))
        seconds = round(time.perf_counter() - started, 1)
        write_json_atomic(done, {"tokens": summary["trained_tokens"], "seconds": seconds})
    return {"head": folder / "head", **json.loads(done.read_text(encoding="utf-8"))}


def decoded(
    target: Target, head: Path, prompts: Sequence[Sequence[int]], depth: int, args: argparse.Namespace
) -> list[list[int]]:
    """Tokens that each pass emitted, by prompt."""
    decoder = SpeculativeDecoder(target, load_head(head, target), Chain(depth=depth))
    return [
        decoder.generate(ids, args.max_new_tokens, args.temperature, seed=i).accepted_lengths
        for i, ids in enumerate(prompts)
    ]


def length(passes: Sequence[list[int]]) -> float:
    """Tokens a pass."""
    return sum(map(sum, passes)) / max(1, sum(map(len, passes)))


def figures(found: Sequence[list[int]], reference: Sequence[list[int]]) -> dict[str, Any]:
    """Accepted length, and how far it is from the reference's, with intervals."""

    def own(drawn: Sequence[int]) -> float:
        return length([found[i] for i in drawn])

    def difference(drawn: Sequence[int]) -> float:
        return own(drawn) - length([reference[i] for i in drawn])

    everything = range(len(found))
    return {
        "prompts": len(found),
        "accepted_length": round(own(everything), 4),
        "accepted_length_ci": [round(v, 4) for v in bootstrap(own, len(found))],
        "against_ordinary": round(difference(everything), 4),
        "against_ordinary_ci": [round(v, 4) for v in bootstrap(difference, len(found))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_intermixed_args()
    console = Console(stderr=True)
    run = load_run(args.config, args.overrides, display(console))
    without = load_run(args.config, [*args.overrides, "on_policy.weight=0"], display(console))
    if not run.config.on_policy or run.online:
        raise ConfigError(f"{args.config}: expected a section on_policy, and extract.online=false")
    arms: dict[str, dict[str, Any]] = {"on_policy": phase(run), "rollouts_only": phase(without)}
    arms["ordinary"] = ordinary(run, arms["on_policy"]["tokens"], console)
    arms["before"] = {"head": run.folder("train") / "head", "tokens": 0, "seconds": 0.0}

    store = FeatureStore(run.folder("extract"))
    _, held_out = split(store, run.config.train.validation_conversations, run.config.seed)
    room = run.target.context - args.max_new_tokens
    prompts = [ids for ids in (prompt_of(store, index) for index in held_out) if 0 < len(ids) <= room]
    assert isinstance(run.method, TrainableMethod)
    depth = run.config.on_policy.depth or run.method.positions
    passes = {name: decoded(run.target, arm["head"], prompts, depth, args) for name, arm in arms.items()}
    for name, arm in arms.items():
        line = {"arm": name, "depth": depth, "temperature": args.temperature, **arm, "head": str(arm["head"])}
        print(json.dumps(line | figures(passes[name], passes["ordinary"])), flush=True)


if __name__ == "__main__":
    main()
