"""transformers drafts with our DFlash heads: its own generator, the same drafts, rounds and text, in float32."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn_texts
from safetensors.torch import load_file
from test_block_forms import BODY, check_back, make_head
from torch import Tensor
from transformers import AutoModel
from transformers.generation import DFlashTokenCandidateGenerator

from sstf.decode import SpeculativeDecoder
from sstf.errors import ExportError, HeadError
from sstf.formats import export_head, load_any, read_any
from sstf.methods import DFlashConfig
from sstf.methods.block import BlockDrafter
from sstf.methods.checkpoint import read_head
from sstf.parity.texts import Text, write_texts
from sstf.targets import Target
from sstf.trees import Chain

NEW, BLOCK = 24, 4
Round = tuple[int, list[int]]  # length of the text, what was drafted behind it


def test_form(tiny_target: Target, tmp_path: Path) -> None:
    stored = make_head(tiny_target, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    sentences = export_head(stored, "transformers", tmp_path)
    assert sentences == ["needs transformers 5.17.0 or later; tried here with 5.23.0"]
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {names.get(name, name): shape for name, shape in BODY.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "muse_glimmer_assistant"
    assert (config["mask_token_id"], config["target_layer_ids"], config["block_size"]) == (7, [1, 3, 5], 5)
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    check_back(stored, tmp_path, tiny_target)
    for left_out, message in (
        ("layer_types", "asks for layer_types"),  # left out, transformers lets every layer slide
        ("target_layer_ids", "the target with 8 layers lacks some"),
        ("mask_token_id", "its mask_token_id is 201818"),
        ("head_dim", r"k_norm\.weight has the shape \[16\]"),
    ):
        others = {name: value for name, value in config.items() if name != left_out}
        (tmp_path / "config.json").write_text(json.dumps(others))
        with pytest.raises(HeadError, match=message):
            read_any(tmp_path, tiny_target.spec)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    assert read_any(tmp_path, tiny_target.spec).layers == (1, 3, 5)  # as its own heads, which do not name it


def test_what_it_cannot_draft_with(tiny_target: Target, tmp_path: Path) -> None:
    smaller = make_head(tiny_target, draft_vocab_size=100)
    with pytest.raises(ExportError, match=r"no version of transformers up to 5\.23\.0 runs a head with a draft voc"):
        export_head(smaller, "transformers", tmp_path, frozen=tiny_target.frozen_head)
    stored = make_head(tiny_target)
    last = type(stored)(
        stored.config.model_copy(update={"layers": (1, 3, 7)}), stored.tensors, (1, 3, 7), stored.target, {}
    )
    with pytest.raises(ExportError, match="the output of the target's last layer, 7, behind the final norm"):
        export_head(last, "transformers", tmp_path)
    assert not list(tmp_path.iterdir())


@dataclass
class Learned:
    """A head that learned the target's answers by heart, in transformers' form."""

    texts: list[Text]
    export: Path
    rounds: list[Round] = field(default_factory=list)


@pytest.fixture(scope="module")
def learned(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    config = DFlashConfig(block_size=BLOCK, num_layers=2, layers=(1, 3, 5))
    texts = write_texts(tiny_target, 3, NEW)
    head = learn_texts(tiny_target, texts, config, folder, 40)
    export_head(read_head(head), "transformers", folder / "export")
    return Learned(texts, folder / "export")


@pytest.fixture
def their_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Round]]:
    rounds: list[Round] = []
    candidates = DFlashTokenCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: Tensor, *others: Any, **named: Any) -> Any:
        found = candidates(self, input_ids, *others, **named)
        rounds.append((input_ids.shape[1], found[0][0, input_ids.shape[1] :].tolist()))
        return found

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recorded)
    yield rounds


@pytest.fixture
def our_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    drafts: list[list[int]] = []
    propose = BlockDrafter.propose

    def recorded(self: BlockDrafter, *given: Any) -> Any:
        trees = propose(self, *given)
        drafts.append(trees[0].tokens.tolist())
        return trees

    monkeypatch.setattr(BlockDrafter, "propose", recorded)
    yield drafts


def test_it_drafts_what_we_draft(
    learned: Learned, tiny_target: Target, their_rounds: list[Round], our_rounds: list[list[int]]
) -> None:
    assistant: Any = AutoModel.from_pretrained(learned.export, dtype=torch.float32)
    head = load_any(learned.export, tiny_target)
    model: Any = tiny_target.model
    accepted = 0
    for text in learned.texts:
        their_rounds.clear()
        our_rounds.clear()
        out = model.generate(
            torch.tensor([text.prompt]), assistant_model=assistant, speculation_type="dflash", do_sample=False,
            max_new_tokens=NEW, eos_token_id=sorted(tiny_target.end_tokens),
        )  # fmt: skip
        ours = SpeculativeDecoder(tiny_target, head, Chain(depth=BLOCK - 1)).generate(text.prompt, NEW)
        assert out[0, len(text.prompt) :].tolist() == ours.token_ids == text.answer
        first, *rounds = their_rounds
        assert first == (len(text.prompt), [])  # the prompt alone, before anything can be drafted
        starts = [start for start, _ in rounds] + [out.shape[1]]
        assert [after - before for before, after in itertools.pairwise(starts)] == ours.accepted_lengths
        drafting = [one for one in rounds if one[1]]  # neither drafts for the last token alone
        for (start, drafted), mine in zip(drafting, our_rounds, strict=True):
            room = len(text.prompt) + NEW - start - 1  # we draft no more than can be emitted
            assert drafted[:room] == mine[:room] and len(drafted[:room]) == len(mine)
        accepted += sum(ours.accepted_lengths) - len(ours.accepted_lengths)
    assert accepted > 10  # there was something to accept
