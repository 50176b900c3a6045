"""A stand-in for the target that needs no model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

from sstf.types import Sampled, SamplingParams


class FakeSampler:
    """Writes letters that depend on the prompt and the seed only; some answers never end."""

    def __init__(self, letters: Sequence[int], end: int, fail_at_call: int | None = None) -> None:
        self.letters, self.end, self.fail_at_call = letters, end, fail_at_call
        self.calls = 0
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        self.calls += 1
        if self.calls == self.fail_at_call:
            raise KeyboardInterrupt
        self.prompts += [list(prompt) for prompt in prompts]
        self.params += params
        return [self._one(prompt, own) for prompt, own in zip(prompts, params, strict=True)]

    def _one(self, prompt: Sequence[int], params: SamplingParams) -> Sampled:
        key = f"{list(prompt)} {params.seed} {params.temperature}".encode()
        draw = random.Random(hashlib.sha256(key).digest())
        ids = [draw.choice(self.letters) for _ in range(draw.randint(3, 60))]
        if len(ids) < params.max_new_tokens:
            return Sampled([*ids, self.end], finished=True)
        return Sampled(ids[: params.max_new_tokens], finished=False)
