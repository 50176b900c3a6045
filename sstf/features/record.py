"""What is written of one conversation: named tensors, and the conversation again from them.

| tensor | rows | dtype and width |
|---|---|---|
| `input_ids` | tokens | uint16, or int32 from a vocabulary of 65,537 on |
| `loss_mask` | tokens | uint8 |
| `features.values`, `features.scales` | tokens | of the codec, `taps` wide |
| `teacher.token` | trained | as `input_ids`; the target's argmax |
| `teacher.lse` | trained | float32 |
| `teacher.hidden.values`, `teacher.hidden.scales` | trained | of the codec, `hidden` wide |
| `teacher.tokens` | trained | as `input_ids`, k wide; in place of the three above where the signal is `topk` |
| `teacher.log_probs` | trained | float16, k wide |

`trained` are the positions t whose next token x_{t+1} is in the loss mask: only there is the target's prediction
learnt from. A log-probability is the logit less the log-sum-exp over the whole vocabulary, subtracted before it is
rounded: float16 is fine near zero, where the mass is, and coarse at the size of a logit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sstf.features.codecs import CODECS, Codec, CodecName, Part
from sstf.features.spec import HiddenSignal, TeacherSignal
from sstf.types import HiddenTeacher, TeacherRows, TopKTeacher

T = TypeVar("T")
Read = Callable[[str, Part, int], Tensor]  # (name, part, rows) -> the tensor [rows, *part.row]


@dataclass(frozen=True)
class Features:
    """Rows of one conversation, `seq` tokens, `row` of them followed by a trained token.

    A store may hand out views of its files: copy before writing.
    """

    features: Tensor  # [seq, taps]
    teacher_token: Tensor  # [seq] int64, the target's argmax where the next token is trained, else -1
    teacher: TeacherRows  # [row, ...]
    input_ids: Tensor  # [seq] int64
    loss_mask: Tensor  # [seq] bool


def taught(loss_mask: Tensor) -> Tensor:
    """Positions whose next token is trained, [row] int64, ascending.

    >>> taught(torch.tensor([False, False, True, True]))
    tensor([1, 2])
    """
    return loss_mask[1:].nonzero()[:, 0]


class Record:
    """The form of every conversation of one store. `signal.k` is at most the vocabulary."""

    def __init__(self, taps: int, hidden: int, vocab: int, codec: CodecName, signal: TeacherSignal) -> None:
        self.codec: Codec = CODECS[codec]
        ids = torch.uint16 if vocab <= 1 << 16 else torch.int32
        self.a_token = {"input_ids": Part(ids), "loss_mask": Part(torch.uint8)}
        self.a_token |= _named("features", self.codec.parts(taps))
        self.topk = not isinstance(signal, HiddenSignal)
        self.a_row: dict[str, Part]  # one row a taught position
        if isinstance(signal, HiddenSignal):
            self.a_row = {"teacher.token": Part(ids), "teacher.lse": Part(torch.float32)}
            self.a_row |= _named("teacher.hidden", self.codec.parts(hidden))
        else:
            self.a_row = {
                "teacher.tokens": Part(ids, (signal.k,)),
                "teacher.log_probs": Part(torch.float16, (signal.k,)),
            }

    def bytes_of(self, tokens: int, rows: int) -> int:
        """Uncompressed size of `tokens` tokens, `rows` of which are followed by a trained one."""
        token_bytes = sum(part.row_bytes for part in self.a_token.values())
        return tokens * token_bytes + rows * sum(part.row_bytes for part in self.a_row.values())

    def encode(self, row: Features) -> dict[str, Tensor]:
        """The tensors of the table above."""
        tensors = {"input_ids": row.input_ids, "loss_mask": row.loss_mask}
        tensors |= _named("features", self.codec.encode(row.features))
        if isinstance(row.teacher, HiddenTeacher):
            tensors["teacher.token"] = row.teacher_token[taught(row.loss_mask)]
            tensors["teacher.lse"] = row.teacher.lse
            tensors |= _named("teacher.hidden", self.codec.encode(row.teacher.hidden))
        else:
            tensors |= {"teacher.tokens": row.teacher.tokens, "teacher.log_probs": row.teacher.log_probs}
        parts = self.a_token | self.a_row
        return {name: tensor.to(parts[name].dtype).contiguous() for name, tensor in tensors.items()}

    def decode_tokens(self, tokens: int, read: Read) -> tuple[Tensor, Tensor]:
        """Token ids [seq] int64 and loss mask [seq] bool alone."""
        return (
            read("input_ids", self.a_token["input_ids"], tokens).long(),
            read("loss_mask", self.a_token["loss_mask"], tokens).bool(),
        )

    def decode(self, tokens: int, read: Read) -> Features:
        """Inverse of `encode`, from a conversation of so many tokens."""
        input_ids, loss_mask = self.decode_tokens(tokens, read)
        where = taught(loss_mask)
        of_tokens = {
            name: read(name, part, tokens) for name, part in self.a_token.items() if name.startswith("features")
        }
        of_rows = {name: read(name, part, len(where)) for name, part in self.a_row.items()}
        teacher: TeacherRows
        if self.topk:
            best = of_rows["teacher.tokens"].long()
            teacher = TopKTeacher(best, of_rows["teacher.log_probs"])
            chosen = best[:, 0]
        else:
            teacher = HiddenTeacher(self._decoded("teacher.hidden", of_rows), of_rows["teacher.lse"])
            chosen = of_rows["teacher.token"].long()
        teacher_token = torch.full((tokens,), -1)
        teacher_token[where] = chosen
        return Features(self._decoded("features", of_tokens), teacher_token, teacher, input_ids, loss_mask)

    def _decoded(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        start = f"{name}."
        return self.codec.decode({key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)})


def _named(name: str, parts: dict[str, T]) -> dict[str, T]:
    return {f"{name}.{key}": value for key, value in parts.items()}
