"""The prompt set of the ladder: prompts of the built-in suite with the target's own greedy answers, and what a head
would have emitted on them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sstf.data.chat_template import render_prompt
from sstf.decode import SpeculativeDecoder
from sstf.errors import DataError
from sstf.evaluation import load_suite
from sstf.targets import Target
from sstf.types import SamplingParams, TokenSample

SUITE = "builtin"


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer, an end token included."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer

    def sample(self, name: str) -> TokenSample:
        """As a conversation to train on: the answer is supervised."""
        return TokenSample(name, self.ids, [False] * len(self.prompt) + [True] * len(self.answer))


def write_texts(target: Target, prompts: int, max_new_tokens: int) -> list[Text]:
    """Answers of the target to prompts from all of the suite's categories; those of two tokens or fewer, in which
    nothing can be drafted, are left out.

    Raises:
        DataError: every answer is that short.
    """
    suite = load_suite(SUITE)
    spread = suite[:: max(1, len(suite) // prompts)][:prompts]
    # What does not fit into a small context loses its beginning: parity needs no sense.
    room = target.context - max_new_tokens
    asked = [render_prompt(target.tokenizer, prompt.messages)[-room:] for prompt in spread]
    made = SpeculativeDecoder(target).generate_batch(asked, SamplingParams(max_new_tokens=max_new_tokens), len(asked))
    texts = [Text(ids, one.token_ids) for ids, one in zip(asked, made, strict=True) if len(one.token_ids) > 2]
    if not texts:
        raise DataError(
            f"target {target.spec.name} ends all {len(asked)} answers after two tokens or fewer, so there is nothing "
            "to draft; check its chat template"
        )
    return texts


def replayed(drafted: Tensor, rows: Tensor, text: Text) -> list[int]:
    """What greedy decoding with these drafts emits, pass by pass, the bonus tokens included.

    A pass that stands at row t (see `features.dataset`) has emitted x_{t+1} and draws drafts of x_{t+2} and on; it
    emits those that are the text's, and one more. Tokens that decoding drafted after a wrong one do not matter, so
    drafts that were made along the text will do. Where there are none, it ends.

    Args:
        drafted: [steps, row] int64 target ids; step i at row t drafts x_{t+2+i}.
        rows: [row] int64, the rows t, ascending.
        text: what is decoded.

    >>> text = Text([7, 7], [1, 2, 3, 4])
    >>> replayed(torch.tensor([[1, 2, 9, 4], [2, 3, 4, 9]]), torch.tensor([0, 1, 2, 3]), text)
    [3]
    >>> replayed(torch.tensor([[1, 9, 3, 4], [2, 3, 4, 9]]), torch.tensor([0, 1, 2, 3]), text)
    [1, 2]
    """
    ids, place = text.ids, {int(row): i for i, row in enumerate(rows)}
    table = drafted.T.tolist()
    lengths = []
    row = len(text.prompt) - 1
    while row + 2 < len(ids) and row in place:
        hits = 0
        left = ids[row + 2 :]
        for token, drawn in zip(left, table[place[row]], strict=False):
            if token != drawn:
                break
            hits += 1
        lengths.append(min(hits + 1, len(left)))
        row += lengths[-1]
    return lengths
