"""The adapter through the real trainer: a few documents learned by heart are drafted almost perfectly."""

from __future__ import annotations

from pathlib import Path

from tiny_store import own_answers, pinned_target, train_config
from transformers import PreTrainedTokenizerBase

from sstf.data.progress import NoProgress
from sstf.decode import SpeculativeDecoder
from sstf.features import ExtractConfig, FeatureStore, extract
from sstf.methods import EarlyExitConfig
from sstf.methods.checkpoint import load_head
from sstf.methods.early_exit import EarlyExitMethod
from sstf.train.trainer import Trainer
from sstf.trees import Chain, StaticTree

METHOD = EarlyExitConfig(exit_layer=6, depth=3, threshold=0.0, draft_vocab_size=200)


def test_a_few_documents_learned_by_heart(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    target = pinned_target(tokenizer)
    samples = own_answers(target, 6)
    extract(
        target, samples, EarlyExitMethod(METHOD).feature_spec(target.spec),
        ExtractConfig(compression="none", batch_tokens=128), tmp_path / "features", NoProgress(),
    )  # fmt: skip
    store = FeatureStore(tmp_path / "features")
    config = train_config(
        steps=200, step_tokens=512, optimizer={"learning_rate": 1e-2}, validation_conversations=0, checkpoint_every=200
    )
    Trainer(store, EarlyExitMethod(METHOD), METHOD, config, tmp_path / "run", 0).run(NoProgress(), "tiny", {})
    head = load_head(tmp_path / "run" / "head", target)
    lengths: list[int] = []
    for policy in (Chain(depth=3), StaticTree.full(2, 2, 1)):
        decoder = SpeculativeDecoder(target, head, policy)
        for sample in samples:
            answer = sample.loss_mask.index(True)
            new = len(sample.input_ids) - answer
            made = decoder.generate(sample.input_ids[:answer], new)
            assert made.token_ids == sample.input_ids[answer:]
            lengths += made.accepted_lengths[:-1]  # the last pass is cut by the length limit
    assert sum(lengths) / len(lengths) > 0.9 * 4
