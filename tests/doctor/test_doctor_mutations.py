"""Every silent failure that is known, planted: doctor fails exactly the check of that name, and an untouched head none.

Where a fault changes what else is measured (a layer captured wrongly is one aligned wrongly), all that fail are named.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt_heads import alter_json, alter_tensors, failed, name_layers, not_passed, verdicts
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

from sstf.data.progress import NoProgress
from sstf.data.tokens import TokenStore
from sstf.doctor import Check, probe
from sstf.doctor.data import check_data, check_template
from sstf.doctor.features import check_store
from sstf.doctor.training import check_training, initial_weights
from sstf.features import FeatureStore, extract, shards, store
from sstf.features.record import Features
from sstf.features.store import ShardInfo
from sstf.formats import export_head
from sstf.heads import Eagle3Head, FusedEagle
from sstf.methods.checkpoint import read_head, save_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.pipeline import Run
from sstf.targets import LayerTaps, Target
from sstf.train.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from sstf.train.trainer import Trainer
from sstf.types import FeatureBatch, Sampled, StepOutput, TokenSample

# ---- nothing is planted ----------------------------------------------------------------------------------------------


def test_an_untouched_head_passes_every_check(head: Path, target: Target) -> None:
    assert not_passed(verdicts(head, target)) == {}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
def test_so_do_its_exports(head: Path, target: Target, tmp_path: Path, engine: Any) -> None:
    export_head(read_head(head), engine, tmp_path / "export")
    checks = verdicts(tmp_path / "export", target)
    assert not_passed(checks) == {}
    assert "layers [2, 4, 6] here: counted" in next(c for c in checks if c.name == "tensors").measured


def test_so_do_its_run_s_features_and_training(run: Run) -> None:
    samples = TokenStore(run.folder("data")).read()
    features = check_store(FeatureStore(run.folder("extract")), samples, run.target, spec_of(run))
    training = check_training(run.folder("train"), read_head(run.folder("train") / "head"), samples)
    assert not_passed([*features, *training]) == {}


# ---- in the files ----------------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers(head: Path, target: Target) -> None:
    alter_tensors(head, lambda tensors: tensors["fc.weight"][3, 4:6].fill_(float("nan")))
    checks = verdicts(head, target)
    assert failed(checks) == ["finite values"]
    assert next(c for c in checks if c.name == "finite values").figures["not_finite"] == 2


def test_weights_of_eight_bits(head: Path, target: Target) -> None:
    alter_tensors(head, lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)}))
    assert failed(verdicts(head, target)) == ["dtypes"]


def test_duplicated_layer_ids(head: Path, target: Target) -> None:
    assert failed(verdicts(name_layers(head, [2, 2, 6]), target)) == ["layer ids"]


def test_fewer_layers_than_fc_reads(head: Path, target: Target) -> None:
    assert failed(verdicts(name_layers(head, [2, 6]), target)) == ["layer ids"]


def test_absolute_d2t(head: Path, target: Target) -> None:
    alter_tensors(head, lambda tensors: tensors["d2t"].add_(torch.arange(len(tensors["d2t"]))))
    assert failed(verdicts(head, target)) == ["vocabulary map"]


def test_t2d_of_other_tokens(head: Path, target: Target) -> None:
    alter_tensors(head, lambda tensors: tensors.update(t2d=tensors["t2d"].roll(1)))
    assert failed(verdicts(head, target)) == ["vocabulary map"]


def test_no_map_though_the_vocabulary_is_smaller(head: Path, target: Target, tmp_path: Path) -> None:
    export = exported(head, tmp_path)
    alter_published(export, lambda tensors: [tensors.pop("d2t"), tensors.pop("t2d")])
    assert failed(verdicts(export, target)) == ["vocabulary map"]


def test_tied_embeddings_inherited(head: Path, target: Target, tmp_path: Path) -> None:
    export = exported(head, tmp_path)
    alter_json(export / "config.json", lambda fields: fields.update(tie_word_embeddings=True))
    assert failed(verdicts(export, target)) == ["tied weights"]


def test_random_embeddings_exported(head: Path, target: Target, tmp_path: Path) -> None:
    export, theirs = exported(head, tmp_path), target.frozen_head.embeddings
    alter_published(export, lambda tensors: tensors.update({"embed_tokens.weight": theirs.clone()}))
    assert failed(verdicts(export, target)) == []
    noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    alter_published(export, lambda tensors: tensors.update({"embed_tokens.weight": noise}))
    checks = verdicts(export, target)
    assert failed(checks) == ["embeddings"]
    assert abs(next(c for c in checks if c.name == "embeddings").figures["cosine"]) < 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("midlayer.hidden_norm.weight"),
        lambda tensors: tensors.update({"fc.bias": torch.zeros(64)}),
        lambda tensors: tensors.update({"norm.weight": torch.ones(63)}),
    ],
    ids=["a norm is missing", "one too many", "another shape"],
)
@pytest.mark.parametrize("published", [False, True])
def test_tensors_missing_or_too_many(
    head: Path, target: Target, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], published: bool
) -> None:
    spoilt = exported(head, tmp_path) if published else head
    (alter_published if published else alter_tensors)(spoilt, change)
    assert failed(verdicts(spoilt, target)) == ["tensors"]


def test_a_target_of_another_shape(head: Path, target: Target) -> None:
    other = Target("wider", tiny_llama(hidden_size=96, num_attention_heads=6), target.tokenizer)
    assert failed(verdicts(head, other)) == ["target"]


def test_a_vocabulary_of_another_target(head: Path, target: Target, tmp_path: Path) -> None:
    other = Target("larger", tiny_llama(vocab_size=320), target.tokenizer)
    assert failed(verdicts(exported(head, tmp_path), other)) == ["target"]


def test_other_weights_of_the_same_shape_are_measured_and_noted(head: Path, target: Target) -> None:
    other = Target("tuned", tiny_llama(seed=3), target.tokenizer)
    assert "warn" in not_passed(verdicts(head, other))["target"]


# ---- against the target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[3, 5, 7], [1, 3, 5]])
def test_layers_off_by_one(head: Path, target: Target, layers: list[int]) -> None:
    assert failed(verdicts(name_layers(head, layers), target)) == ["layer alignment"]


def test_export_in_another_convention(head: Path, target: Target, tmp_path: Path) -> None:
    """Ids counted for vLLM in a file that says that they are SGLang's."""
    export = exported(head, tmp_path)
    alter_json(export / "config.json", lambda fields: fields.update(sstf_export="sglang"))
    assert failed(verdicts(export, target)) == ["layer alignment"]


def test_a_layer_captured_wrongly(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = LayerTaps.__init__

    def wrongly(self: LayerTaps, layers: nn.ModuleList, ids: Sequence[int]) -> None:
        rightly(self, nn.ModuleList([layers[0], *list(layers)[:-1]]), ids)

    monkeypatch.setattr(LayerTaps, "__init__", wrongly)
    assert failed(verdicts(head, target)) == ["layer capture", "layer alignment"]


def test_final_norm_missing_in_the_teacher(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "features_of", un_normed)
    assert "final norm" in failed(verdicts(head, target))


def test_rope_scaling_lost(head: Path, target: Target, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    scaled = Target("scaled", tiny_llama(rope_parameters=scaling), target.tokenizer)
    draft_tokens = torch.arange(200)
    method = Eagle3Method(read_head(head).config)
    for spec, expected in ((scaled.spec, "pass"), (dataclasses.replace(scaled.spec, rope_scaling=None), "fail")):
        module = method.build_head(spec, scaled.frozen_head, draft_tokens)
        save_head(tmp_path / expected, method.config, module, spec, {"step": 0})
        check = next(c for c in verdicts(tmp_path / expected, scaled) if c.name == "rotary positions")
        assert check.verdict == expected
    assert check.figures["frequency"] == pytest.approx(3.0, rel=1e-3)  # four times the target's


def test_a_norm_left_out_where_it_drafts(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = FusedEagle._norm

    def flagless(self: FusedEagle, x: Tensor, weight: Tensor) -> Tensor:
        dropped = weight.data_ptr() == self.head.midlayer.hidden_norm.weight.data_ptr()
        return F.rms_norm(x, weight.shape, None, 1e-6) if dropped else norm(self, x, weight)

    monkeypatch.setattr(FusedEagle, "_norm", flagless)
    checks = verdicts(head, target)
    assert failed(checks) == ["norm weights"]
    assert "hidden_norm" in not_passed(checks)["norm weights"]


def test_a_norm_left_out_where_it_trains(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The post-attention norm's weight is put back to ones before every pass."""
    unroll = Eagle3Head.unroll

    def flagless(self: Eagle3Head, *args: Any) -> Tensor:
        kept = self.midlayer.post_attention_layernorm.weight.clone()
        self.midlayer.post_attention_layernorm.weight.fill_(1)
        out = unroll(self, *args)
        self.midlayer.post_attention_layernorm.weight.copy_(kept)
        return out

    monkeypatch.setattr(Eagle3Head, "unroll", flagless)
    assert "norm weights" in failed(verdicts(head, target))


def test_attention_to_the_future(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    unroll = Eagle3Head.unroll

    def leaking(self: Eagle3Head, g: Tensor, tokens: Tensor, lengths: Sequence[int], reads: Tensor) -> Tensor:
        means = [part.mean(0).expand(len(part), -1) for part in g.split(list(lengths))]
        return unroll(self, g, tokens, lengths, reads) + 0.1 * torch.cat(means)[reads]

    monkeypatch.setattr(Eagle3Head, "unroll", leaking)
    assert failed(verdicts(head, target)) == ["leak from the future"]


def test_packing_that_leaks(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    unroll = Eagle3Head.unroll
    monkeypatch.setattr(
        Eagle3Head, "unroll", lambda self, g, tokens, lengths, reads: unroll(self, g, tokens, [sum(lengths)], reads)
    )
    assert failed(verdicts(head, target)) == ["packing"]


def test_tokens_outside_the_draft_vocabulary_supervised(
    head: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Eagle3Method.loss

    def all_of_them(self: Eagle3Method, module: nn.Module, batch: FeatureBatch, frozen: Any) -> StepOutput:
        assert isinstance(module, Eagle3Head)
        kept = module.t2d.clone()
        module.t2d.fill_(True)
        out = loss(self, module, batch, frozen)
        module.t2d.copy_(kept)
        return out

    monkeypatch.setattr(Eagle3Method, "loss", all_of_them)
    assert failed(verdicts(head, target)) == ["outside the draft vocabulary"]


def test_a_stale_draft_vocabulary(head: Path, run: Run, target: Target, training: Path) -> None:
    """The map of other data: half of the target's words are not in it."""
    samples = TokenStore(run.folder("data")).read()

    def stale(tensors: dict[str, Tensor]) -> None:
        written = torch.bincount(torch.tensor([t for s in samples for t in s.input_ids]), minlength=300)
        rarest = written.argsort()[:200].sort().values
        tensors["d2t"] = rarest - torch.arange(200)
        tensors["t2d"] = torch.zeros(300, dtype=torch.bool).index_fill_(0, rarest, True)
        tensors["lm_head.weight"] = target.frozen_head.lm_head[rarest].clone()

    alter_tensors(head, stale)
    assert "vocabulary coverage" in failed(verdicts(head, target))
    assert failed(check_training(training, read_head(head), samples)) == ["vocabulary of this data"]


def test_a_target_that_repeats_itself(head: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def looping(self: object, prompts: Sequence[Sequence[int]], *others: object) -> list[Sampled]:
        return [Sampled([7, 8, 9] * 20, False)] * len(prompts)

    monkeypatch.setattr(probe.BatchSampler, "sample", looping)
    assert failed(verdicts(head, target)) == ["degenerate text"]


# ---- trained wrongly -------------------------------------------------------------------------------------------------


def train_on(run: Run, folder: Path, plant: Callable[[Features], Features], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The head of a training whose rows are aligned wrongly; what reads it afterwards aligns them rightly."""
    rightly = store.collate
    with monkeypatch.context() as planted:
        planted.setattr(store, "collate", lambda rows: rightly([plant(row) for row in rows]))
        config = run.config.train.model_copy(update={"steps": 50, "validate_every": 50})
        features = FeatureStore(run.folder("extract"))
        method: Any = run.method
        Trainer(features, method, run.config.method, config, folder, 0).run(NoProgress(), "planted", {})
    return folder / "head"


def test_labels_one_token_early(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head learns to say the token that it reads."""

    def shifted(row: Features) -> Features:
        return dataclasses.replace(row, features=row.features.roll(-1, 0), input_ids=row.input_ids.roll(-1))

    assert failed(verdicts(train_on(run, tmp_path, shifted, monkeypatch), run.target)) == ["label shift"]


def test_features_of_the_next_position(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees the state that predicts what it has to predict."""

    def shifted(row: Features) -> Features:
        return dataclasses.replace(row, features=row.features.roll(-1, 0))

    assert failed(verdicts(train_on(run, tmp_path, shifted, monkeypatch), run.target)) == ["feature shift"]


def test_an_accuracy_that_is_too_good(run: Run, training: Path) -> None:
    log = training / "metrics.jsonl"
    first, *others = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"train/accuracy/0": 0.99}), *others]), encoding="utf-8")
    assert failed(of_training(run, training)) == ["early accuracy"]


def test_weights_that_cannot_move(run: Run, training: Path) -> None:
    """Trained in bfloat16: a step of a thousandth of a weight is less than half of its spacing."""
    first, last = (read_checkpoint(path) for path in list_checkpoints(training / "checkpoints"))
    start = {name: t.bfloat16() if t.is_floating_point() else t for name, t in first.head.items()}
    moved = {name: t * 1.001 if t.is_floating_point() else t for name, t in start.items()}
    for checkpoint, weights in ((first, start), (last, moved)):
        whole = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
        save_checkpoint(training / "checkpoints", dataclasses.replace(checkpoint, head=whole), keep=2)
    assert failed(of_training(run, training)) == ["frozen entries"]


def test_weights_that_did_not_move_since_they_were_drawn(run: Run, training: Path, tmp_path: Path) -> None:
    """A short training keeps one state alone, which is compared with its beginning."""
    shutil.rmtree(training / "checkpoints")
    head, samples = read_head(training / "head"), TokenStore(run.folder("data")).read()
    start = initial_weights(head, run.target.frozen_head, run.config.seed)
    assert not_passed(check_training(training, head, samples, start)) == {}
    trainer = Trainer(
        FeatureStore(run.folder("extract")), run.method, run.config.method, run.config.train, tmp_path, run.config.seed
    )  # before its first step
    assert all(torch.equal(start[name], tensor) for name, tensor in trainer.module.head.state_dict().items())
    unmoved = dataclasses.replace(head, tensors=start)
    assert failed(check_training(training, unmoved, samples, start)) == ["frozen entries"]
    assert "skipped" in not_passed(check_training(training, head, samples))["frozen entries"]


# ---- in the data -----------------------------------------------------------------------------------------------------


def of_samples(run: Run, samples: list[TokenSample]) -> list[str]:
    tokenizer, config = run.target.tokenizer, run.config.data
    return failed(check_data(samples, ["a"] * len(samples), [], tokenizer, 300, config.max_length, config.turns))


def masked(run: Run, mask: Callable[[TokenSample], list[bool]]) -> list[TokenSample]:
    return [dataclasses.replace(s, loss_mask=mask(s)) for s in TokenStore(run.folder("data")).read()]


def test_a_mask_of_ones(run: Run) -> None:
    # An answer then is the whole text, which has every turn's end inside.
    names = of_samples(run, masked(run, lambda s: [True] * len(s.input_ids)))
    assert names == ["trained share", "end of a turn inside an answer"]


def test_a_mask_of_zeros(run: Run) -> None:
    assert of_samples(run, masked(run, lambda s: [False] * len(s.input_ids))) == ["trained share", "nothing trained"]


def test_loops_in_the_data(run: Run) -> None:
    loops = [
        TokenSample(s.id, [*s.input_ids[:20], *[50, 51] * 40, 2], [False] * 20 + [True] * 81)
        for s in masked(run, lambda s: s.loss_mask)
    ]
    assert "answers stuck in a loop" in of_samples(run, loops)


def test_ids_of_another_tokenizer(run: Run) -> None:
    beyond = [dataclasses.replace(s, input_ids=[*s.input_ids[:-1], 300]) for s in masked(run, lambda s: s.loss_mask)]
    assert "ids outside the vocabulary" in of_samples(run, beyond)


DROPS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] and loop.last %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reasoning", "verdict"),
    [
        (None, None, "pass"),
        (DROPS_REASONING, "hm", "fail"),
        (DROPS_REASONING, None, "pass"),
        (EMPTY_THINKING, None, "fail"),
    ],
)
def test_a_template_that_changes_what_was_said(
    tokenizer: Any, template: str | None, reasoning: str | None, verdict: str
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    answer = {"role": "assistant", "content": "Hi"} | ({"reasoning_content": reasoning} if reasoning else {})
    turns = [{"role": "user", "content": "Hello"}, answer, {"role": "user", "content": "and?"}, answer]
    assert check_template([{"id": "a", "source": "s", "messages": turns}], tokenizer, "every").verdict == verdict


# ---- in the features -------------------------------------------------------------------------------------------------


def spec_of(run: Run) -> Any:
    return run.method.feature_spec(run.target.spec)


def of_training(run: Run, folder: Path) -> list[Check]:
    return check_training(folder, read_head(folder / "head"), TokenStore(run.folder("data")).read())


def of_store(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, planted: Any
) -> list[str]:
    """What fails of a store that was made by spoilt code and is checked by good code."""
    samples = TokenStore(run.folder("data")).read()[:40]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, planted)
        extract(run.target, samples, spec_of(run), run.config.extract, folder, NoProgress())
    return failed(check_store(FeatureStore(folder), samples, run.target, spec_of(run)))


def un_normed(target: Target, sample: TokenSample, tapped: Tensor, hidden: Tensor, signal: Any) -> Features:
    """As `features_of`, of states that look like those before the final norm."""
    scale = torch.linspace(1, 8, len(hidden))[:, None]
    return FEATURES_OF(target, sample, tapped, hidden / target.frozen_head.final_norm * scale, signal)


FEATURES_OF = shards.features_of


def test_a_store_of_un_normed_teachers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_store(run, tmp_path, monkeypatch, shards, "features_of", un_normed) == ["stored teacher"]


def test_a_store_of_the_layers_below(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = Target.tap

    def lower(self: Target, ids: Sequence[int]) -> LayerTaps:
        return rightly(self, [layer - 1 for layer in ids])

    assert of_store(run, tmp_path, monkeypatch, Target, "tap", lower) == ["stored layers"]


def test_truncated_states(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = store.write_shard

    def cut(folder: Path, index: int, ids: list[str], rows: Sequence[Features], origin: Any) -> ShardInfo:
        return write(folder, index, ids, [dataclasses.replace(row, features=row.features[:-3]) for row in rows], origin)

    assert of_store(run, tmp_path, monkeypatch, shards, "write_shard", cut) == ["states per token"]


def test_features_of_other_data(run: Run) -> None:
    samples = TokenStore(run.folder("data")).read()
    edited = [dataclasses.replace(samples[0], input_ids=[*samples[0].input_ids[:-1], 5]), *samples[1:]]
    checks = check_store(FeatureStore(run.folder("extract")), edited, run.target, spec_of(run))
    assert failed(checks) == ["features of this run"]
    assert "another data" in not_passed(checks)["features of this run"]


def test_features_under_another_template(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.target.tokenizer, "chat_template", "other")
    samples = TokenStore(run.folder("data")).read()
    checks = check_store(FeatureStore(run.folder("extract")), samples, run.target, spec_of(run))
    assert failed(checks) == ["features of this run"]


def test_answers_of_another_model(run: Run, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        TokenSample(s.id, torch.randint(3, 290, (len(s.input_ids),), generator=generator).tolist(), s.loss_mask)
        for s in TokenStore(run.folder("data")).read()[:40]
    ]
    extract(run.target, samples, spec_of(run), run.config.extract, tmp_path, NoProgress())
    assert failed(check_store(FeatureStore(tmp_path), samples, run.target, spec_of(run))) == ["on-policy share"]


# ---- helpers ---------------------------------------------------------------------------------------------------------


def exported(head: Path, folder: Path) -> Path:
    export_head(read_head(head), "vllm", folder / "export")
    return folder / "export"


def alter_published(export: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(export / "model.safetensors")
    change(tensors)
    shutil.rmtree(export / "model.safetensors", ignore_errors=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, export / "model.safetensors")
