"""The whole path on the real target: eight conversations learned by heart must be drafted almost perfectly.

The same head served by vLLM: `scripts/verify_overfit.sh`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sstf.data.chat_template import render_prompt
from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.evaluation import load_suite
from sstf.methods.checkpoint import load_head
from sstf.pipeline import load_run
from sstf.trees import Chain, DynamicTree

CONFIG = Path(__file__).parents[2] / "configs/smollm2-135m-instruct/overfit.yaml"


@pytest.mark.slow
def test_eight_conversations_learned_by_heart_are_drafted_almost_perfectly(tmp_path: Path) -> None:
    run = load_run(CONFIG, [f"output_dir={tmp_path}"], NoProgress())
    run.up_to("train")
    head = load_head(run.folder("train") / "head", run.target)
    depth = 3
    for policy in (Chain(depth=depth), DynamicTree(depth=depth, top_k=4, total_tokens=8)):
        decoder = SpeculativeDecoder(run.target, head, policy)
        lengths: list[int] = []
        for prompt in load_suite(str(run.folder("data") / "conversations.jsonl")):
            made = decoder.generate(render_prompt(run.target.tokenizer, prompt.messages), max_new_tokens=96)
            lengths += made.accepted_lengths[:-1]  # the last pass is cut by the length limit
        assert sum(lengths) / len(lengths) >= 0.9 * (depth + 1)
