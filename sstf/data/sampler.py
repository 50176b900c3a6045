"""What generation needs from a target: one method. The implementation lives in a higher layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

from sstf.types import Sampled, SamplingParams


class Sampler(Protocol):
    """Continues prompts given as token ids."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        """Continue each prompt until an end token or its length limit.

        Args:
            prompts: Token ids, one list a sequence.
            params: One a prompt. A row's draws depend on its own seed only, never on its neighbours.
            slots: Sequences decoded at once.
            on_token: Called with the number of tokens drawn since the last call.

        Returns:
            One continuation a prompt, in the order of the prompts; the end token is included when one was drawn.
        """


class LazySampler:
    """Makes the sampler at the first request: loading a target takes long, and a resumed run may not need it."""

    def __init__(self, factory: Callable[[], Sampler]) -> None:
        self._factory = factory
        self._sampler: Sampler | None = None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        slots: int,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Sampled]:
        """See `Sampler.sample`."""
        if self._sampler is None:
            self._sampler = self._factory()
        return self._sampler.sample(prompts, params, slots, on_token)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, the same in every process (Python's `hash` is not)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
