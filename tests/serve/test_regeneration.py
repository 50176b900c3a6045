"""`sstf data` may ask `sstf serve`: the sampler over HTTP gets the decoder's own answers."""

from __future__ import annotations

from pathlib import Path

from loopback_server import lookup, running

from sstf.data.server import ServerSampler
from sstf.data.server_client import ServerConfig
from sstf.decode import SpeculativeDecoder
from sstf.targets import Target
from sstf.types import SamplingParams


def test_answers_of_the_sampler(tiny_target: Target, tmp_path: Path) -> None:
    prompts = [[5, 6, 7], [9] * 12, [40, 41, 42, 43]]
    params = [
        SamplingParams(0.0, max_new_tokens=9),
        SamplingParams(1.0, 0.9, 20, 12, seed=4),
        SamplingParams(1.0, seed=5, max_new_tokens=60),
    ]
    with running(lookup(tiny_target), context=250) as server:
        config = ServerConfig(base_url=f"{server.url}/v1")
        notes: list[str] = []
        sampler = ServerSampler(
            config, tiny_target.tokenizer, tiny_target.end_tokens, 200, tmp_path / "journal", "tiny", notes.append
        )
        found = sampler.sample(prompts, params, slots=2)
    assert sampler.report.form == "token_ids" and sampler.report.seeds and not notes
    decoder = SpeculativeDecoder(tiny_target)
    for prompt, one, answer in zip(prompts, params, found, strict=True):
        expected = decoder.generate_batch([prompt], one, 1)[0]
        assert answer.token_ids == expected.token_ids
        assert answer.finished == (expected.ended == "end")
