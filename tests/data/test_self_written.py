from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_sampler import FakeSampler
from transformers import PreTrainedTokenizerBase

from sstf.data.chat_template import user_turn_prefix
from sstf.data.config import SelfWrittenSource
from sstf.data.groups import GroupFiles
from sstf.data.progress import NoProgress
from sstf.data.self_written import WrittenPrompts, write_prompts
from sstf.errors import DataError
from sstf.types import Sampled, SamplingParams

MakeSampler = Callable[..., FakeSampler]


class Scripted:
    """Writes given texts in order; a text that ends with `…` is cut off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, iter(texts)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        results = []
        for _, text in zip(prompts, self.texts, strict=False):
            ids = self.tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
            finished = not text.endswith("…")
            results.append(Sampled([*ids, self.tokenizer.eos_token_id] if finished else ids, finished))
        return results


def run(tokenizer: PreTrainedTokenizerBase, sampler: object, folder: Path, config: SelfWrittenSource) -> WrittenPrompts:
    files = GroupFiles(folder, "prompts", "target")
    return write_prompts(tokenizer, sampler, config, files, NoProgress())  # type: ignore[arg-type]


def test_each_reason_to_drop_a_request(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = [
        "  Write a long enough request for me: one.\n",
        "Write a long enough request",  # cut below
        "short",
        "Say this <|im_start|> and then go on",
        "Write a long enough request for me: one.",
        "WRITE a long enough REQUEST for me: two.",
        "Write a long enough request for me: three.",
        "Something quite different from it",
    ]
    texts[1] += "…"
    config = SelfWrittenSource(conversations=3, max_same_opening=2, group_size=len(texts))
    written = run(tokenizer, Scripted(tokenizer, texts), tmp_path, config)
    assert [(c.id, c.messages[0].role, c.messages[0].content) for c in written.conversations] == [
        ("self_written:1", "user", texts[0].strip()),
        ("self_written:2", "user", texts[5]),
        ("self_written:3", "user", texts[7]),
    ]
    assert written.drawn == 8
    assert written.dropped == {
        "not finished": 1,
        "too short": 1,
        "special token inside": 1,
        "duplicate": 1,
        "repeated opening": 1,
    }


def test_resume_gives_the_same_requests(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    config = SelfWrittenSource(conversations=20, group_size=8, max_prompt_tokens=50)
    unbroken = run(tokenizer, make_sampler(), tmp_path / "a", config)
    assert len(unbroken.conversations) == 20
    assert unbroken.drawn == 20 + sum(unbroken.dropped.values())
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, make_sampler(fail_at_call=2), tmp_path / "b", config)
    sampler = make_sampler()
    assert run(tokenizer, sampler, tmp_path / "b", config) == unbroken
    assert sampler.prompts[0] == user_turn_prefix(tokenizer)
    # More requests later: those drawn before stay.
    more = run(tokenizer, sampler, tmp_path / "b", config.model_copy(update={"conversations": 30}))
    assert more.conversations[:20] == unbroken.conversations


def test_gives_up_after_draws_that_keep_nothing(
    tokenizer: PreTrainedTokenizerBase, make_sampler: MakeSampler, tmp_path: Path
) -> None:
    config = SelfWrittenSource(conversations=5, min_characters=1000, group_size=24)
    sampler = make_sampler()
    with pytest.raises(DataError, match=r"no usable request in 72 draws, with 0 of 5 kept; dropped: \d+ too short"):
        run(tokenizer, sampler, tmp_path, config)
    assert sampler.calls == 3
