"""The prompts of a run's held-out conversations, as JSON lines that `verify_vllm.sh --prompts` and evaluations read.

    python scripts/held_out_prompts.py CONFIG [key.sub=value ...] > held_out.jsonl

They are of the kind that the head was trained on, and it has not seen them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sstf.data.progress import NoProgress
from sstf.features import FeatureStore, split
from sstf.pipeline import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    run = load_run(args.config, args.overrides, NoProgress())
    store = FeatureStore(run.folder("extract"))
    _, held_out = split(store, run.config.train.validation_conversations, run.config.seed)
    wanted = {store.ids[i] for i in held_out}
    for line in (run.folder("data") / "conversations.jsonl").read_text(encoding="utf-8").split("\n"):
        row = json.loads(line) if line else {}
        if row.get("id") in wanted and "messages" in row:
            first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
            print(json.dumps({"id": row["id"], "messages": row["messages"][:first]}))


if __name__ == "__main__":
    main()
