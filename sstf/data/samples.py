"""Whatever a source held -> token ids and loss mask."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer
from sstf.data.chat_template import render_turns
from sstf.data.config import Turns
from sstf.data.rows import Item, PlainText, Pretokenised
from sstf.errors import DataError
from sstf.types import Conversation, TokenSample


def samples(
    item: Item,
    tokenizer: PreTrainedTokenizerBase,
    turns: Turns,
    answers: Sequence[Answer | None] | None = None,
) -> list[TokenSample]:
    """The samples of one item, uncut.

    Args:
        item: A conversation, plain text or token ids.
        tokenizer: The target's; it needs a chat template for conversations only.
        turns: Which answers of a conversation are trained, see `DataConfig`.
        answers: Ids of generated answers, see `chat_template.render`.

    Returns:
        One sample an item, but for conversations with `turns` each.

    Raises:
        DataError: The template cannot be used, or token ids lie beyond the tokenizer's vocabulary.
    """
    match item:
        case Conversation():
            return render_turns(tokenizer, item, turns, answers)
        case PlainText():
            # With the special tokens that the tokenizer puts around text (a BOS, say), as the target was trained.
            ids = list(tokenizer(item.text, verbose=False)["input_ids"])
            return [TokenSample(item.id, ids, [t > 0 for t in range(len(ids))])]
        case Pretokenised():
            highest = max(item.input_ids)
            if highest >= len(tokenizer):
                raise DataError(
                    f"{item.id} ({item.source}) holds token {highest}, expected ids below {len(tokenizer)}, "
                    "the size of the target's vocabulary; the rows were tokenised for another target."
                )
            return [TokenSample(item.id, item.input_ids, item.loss_mask)]
