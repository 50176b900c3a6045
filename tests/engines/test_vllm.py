"""vLLM serves a head as our decoder does: its own count of accepted tokens says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import NEW, PROMPTS, Learned

from sstf.data.progress import NoProgress
from sstf.formats import Engine, export_head
from sstf.methods.checkpoint import read_head
from sstf.parity.ladder import ParitySettings, climb
from sstf.parity.report import Parity

pytestmark = pytest.mark.engine
WITHIN = 0.05  # of our decoder's accepted length


def served(learned: Learned, vllm: Path, exported: Path) -> Parity:
    settings = ParitySettings(prompts=PROMPTS, max_new_tokens=NEW, exported=exported, vllm=vllm)
    return climb(learned.head, learned.target, settings, "bf16", NoProgress())


@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_vllm_accepts_what_our_decoder_accepts(vllm: Path, learned: Learned, engine: Engine, tmp_path: Path) -> None:
    """In its own form of a head, and in that of speculators, which it reads too."""
    target = learned.target
    export_head(read_head(learned.head), engine, tmp_path, str(target.model.name_or_path), target.frozen_head)
    parity = served(learned, vllm, tmp_path)
    print("\n" + parity.sentence)
    ours, theirs = parity.rungs[-2:]
    assert theirs.name == "vllm" and ours.accepted_length is not None and theirs.accepted_length is not None
    assert ours.accepted_length > 2.5  # there is something to lose
    assert theirs.accepted_length == pytest.approx(ours.accepted_length, rel=WITHIN)
    assert parity.passed, parity.faults


def test_vllm_shows_what_a_wrong_layer_costs(vllm: Path, learned: Learned, tmp_path: Path) -> None:
    """The comparison can fail: ids off by one load and serve without a word."""
    export_head(read_head(learned.head), "vllm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for place in (config, config["eagle_config"]):
        for name in ("eagle_aux_hidden_state_layer_ids", "layer_ids"):
            if name in place:
                place[name] = [one + 1 for one in place[name]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    parity = served(learned, vllm, tmp_path)
    print("\n" + parity.sentence)
    right, wrong, engine = (rung.accepted_length for rung in parity.rungs[1:])
    assert right is not None and wrong is not None and engine is not None
    assert parity.rungs[2].first_difference == "layers"
    assert engine < (1 - WITHIN) * right
    assert engine == pytest.approx(wrong, rel=WITHIN)  # our decoder foretells it
