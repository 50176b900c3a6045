from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sstf.errors import ExportError
from sstf.formats.compatibility import facts, features_of, needs, table
from sstf.methods import Eagle3Config
from sstf.targets import Target

USUAL = (1, 3, 4)  # of the tiny target's 8 layers


def test_what_a_head_needs(tiny_target: Target) -> None:
    spec = tiny_target.spec
    assert features_of(Eagle3Config(), spec, False) == ["eagle3"]
    assert features_of(Eagle3Config(layers=USUAL), spec, True) == ["eagle3", "full_vocabulary"]
    assert features_of(Eagle3Config(layers=(1, 4), fc_norm=True, norm_output=True), spec, False) == [
        "eagle3",
        "other_layers",
        "other_layer_count",
        "fc_norm",
        "norm_output",
    ]
    deepseek = replace(spec, architecture="DeepseekV3ForCausalLM")
    assert features_of(Eagle3Config(layers=USUAL), deepseek, False) == ["eagle3"]
    assert features_of(Eagle3Config(layers=(2, 3, 4)), deepseek, False)[-1] == "layers_of_deepseek"


def test_sentences(tiny_target: Target) -> None:
    spec = tiny_target.spec
    plain, newer, four = (
        features_of(config, spec, False)
        for config in (
            Eagle3Config(),
            Eagle3Config(norm_output=True, norm_before_fc=True),
            Eagle3Config(layers=(1, 2, 3, 4)),
        )
    )
    assert needs("vllm", plain) == ["needs vLLM 0.8.5 or later; tried here with 0.32.0"]
    assert needs("vllm", newer) == [
        "needs vLLM 0.22.0 or later, for norm_output; tried here with 0.32.0, but for norm_before_fc, norm_output"
    ]
    assert needs("sglang", newer) == ["needs SGLang 0.5.17 or later, for norm_before_fc; untested here"]
    (library, engine) = needs("speculators", newer)
    assert library.startswith("needs speculators 0.7.0 or later, for norm_output; ")
    assert engine.startswith("needs vLLM 0.25.0 or later, for norm_output; ")
    assert needs("speculators", four)[1] == "vLLM does not run it in this form: other_layer_count"


def test_a_head_that_an_engine_cannot_run(tiny_target: Target) -> None:
    wanted = features_of(Eagle3Config(norm_before_residual=True), tiny_target.spec, False)
    with pytest.raises(ExportError, match=r"no version of SGLang up to 0\.5\.23 runs a head with norm_before_residual"):
        needs("sglang", wanted)
    assert len(needs("vllm", wanted)) == 1


def test_every_feature_has_a_fact_for_every_engine_and_a_source() -> None:
    known = {(fact.engine, fact.form, fact.feature) for fact in facts()}
    assert len(known) == len(facts())
    others = {
        "layers_of_deepseek",
        "batch_schedule",
        "eagle",
        "p_eagle",
        "several_layers",
        "medusa",
        "dflash",
        "dspark",
        "smaller_vocabulary",
    }
    features = {fact.feature for fact in facts()} - others
    for place in (("vllm", "eagle"), ("vllm", "speculators"), ("speculators", "speculators"), ("sglang", "eagle")):
        assert {feature for engine, form, feature in known if (engine, form) == place} >= features, place
    for fact in facts():
        assert fact.source and (fact.since is None or re.fullmatch(r"\d+\.\d+\.\d+", fact.since)), fact


def test_the_docs_show_the_table() -> None:
    """Made by `sstf.formats.compatibility.table`."""
    assert table() in (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
