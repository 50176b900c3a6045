"""Extracts the same conversations with transformers and with vLLM, and says how far the two stores differ.

    scripts/verify_vllm.sh --install-only        # vLLM in an environment of its own, once
    python scripts/verify_vllm_features.py --python .venv-vllm/bin/python [--target NAME] [--limit 64]

What does not come from the target's layers has to be equal: conversations, tokens, masks, shards, frozen head. Hidden
states may differ by the rounding of the target's dtype; how much, is printed as one JSON object: relative error of a
token's states by tap (median, 99th percentile, largest), and how often the argmax of the teacher agrees. Ends with 1
where an error is too large to be rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from sstf.data.build import preview_samples
from sstf.data.config import DataConfig, KeepAnswers, SampleSource
from sstf.data.progress import NoProgress
from sstf.features import ExtractConfig, FeatureSpec, FeatureStore, extract, own_target
from sstf.features.engines import VllmEngine
from sstf.targets import TargetConfig, load_configured
from sstf.types import HiddenTeacher

# Of a token's states in bfloat16 after 30 layers; wrong layers, positions or norms are off by about 1.
MEDIAN_LIMIT, AGREEMENT_LIMIT = 0.05, 0.85


def relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[row]: the norm of the difference, in units of the norm."""
    return (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)


def summary(errors: list[torch.Tensor]) -> dict[str, float]:
    every = torch.cat(errors)
    p50, p99 = every.quantile(torch.tensor([0.5, 0.99])).tolist()
    return {"p50": round(p50, 5), "p99": round(p99, 5), "max": round(float(every.max()), 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM")
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--limit", type=int, default=64, help="conversations")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--memory", type=float, default=0.3, help="share of the memory for vLLM")
    args = parser.parse_args()

    source = TargetConfig(name=args.target, dtype=args.dtype)
    plain = ExtractConfig(shard_tokens=4096)
    vllm = plain.model_copy(update={"engine": VllmEngine(kind="vllm", python=args.python, memory=args.memory)})
    stores, seconds = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in (("transformers", plain), ("vllm", vllm)):
            target = load_configured(own_target(config, source))
            layers = target.spec.num_layers
            # The last layer too: its output is the one that vLLM's final norm is not applied to.
            spec = FeatureSpec((1, layers // 2 - 1, layers - 4, layers - 1))
            data = DataConfig(source=SampleSource(), answers=KeepAnswers(), max_length=args.max_length)
            samples = [sample for sample, _ in preview_samples(data, target.tokenizer, args.limit)]
            started = time.perf_counter()
            extract(target, samples, spec, config, Path(scratch) / name, NoProgress(), source)
            seconds[name] = time.perf_counter() - started
            stores[name] = FeatureStore(Path(scratch) / name)
        ours, theirs = stores["transformers"], stores["vllm"]
        assert (ours.ids, ours.lengths, ours.trained) == (theirs.ids, theirs.lengths, theirs.trained)
        assert [shard.ids for shard in ours.shards] == [shard.ids for shard in theirs.shards]
        frozen = [(store.folder / "frozen.safetensors").read_bytes() for store in (ours, theirs)]
        assert frozen[0] == frozen[1]
        errors: dict[str, list[torch.Tensor]] = {f"layer {layer}": [] for layer in spec.layers}
        errors["last state, after the final norm"] = []
        same = rows = 0
        for i in range(len(ours)):
            a, b = ours[i], theirs[i]
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_mask, b.loss_mask)
            for k, layer in enumerate(spec.layers):
                width = slice(k * ours.target.hidden_size, (k + 1) * ours.target.hidden_size)
                errors[f"layer {layer}"].append(relative(b.features[:, width], a.features[:, width]))
            assert isinstance(a.teacher, HiddenTeacher) and isinstance(b.teacher, HiddenTeacher)
            errors["last state, after the final norm"].append(relative(b.teacher.hidden, a.teacher.hidden))
            trained = a.teacher_token >= 0
            assert torch.equal(trained, b.teacher_token >= 0)
            same += int((a.teacher_token == b.teacher_token)[trained].sum())
            rows += int(trained.sum())
    found = {name: summary(parts) for name, parts in errors.items()}
    report = {
        "target": args.target,
        "dtype": args.dtype,
        "conversations": len(samples),
        "tokens": ours.tokens,
        "relative error of a token": found,
        "argmax agreement": round(same / rows, 5),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    print(json.dumps(report, indent=2))
    good = all(one["p50"] < MEDIAN_LIMIT for one in found.values()) and same / rows > AGREEMENT_LIMIT
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
