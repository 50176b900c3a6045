"""Where numbers that are not finite come from, once a step has stopped over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sstf.errors import DataError
from sstf.features import FeatureSource
from sstf.types import FeatureBatch, HiddenTeacher


def not_finite(
    step: int, source: FeatureSource, conversations: Sequence[int], loss: Callable[[FeatureBatch], float]
) -> DataError:
    """The error for a step whose gradient is not finite: its first conversation with bad features, or with a loss
    that is not finite, by shard and row.

    Args:
        step: 0-based.
        source: of the features.
        conversations: all that the step took.
        loss: of one conversation alone.
    """
    suspect = ""
    for index in conversations:
        batch = source.batch([index])
        named = {"features": batch.features}
        named |= {name: value for name, value in vars(batch.teacher).items() if isinstance(value, Tensor)}
        if not isinstance(batch.teacher, HiddenTeacher):
            named.pop("log_probs")  # -inf where the draft vocabulary holds nothing is in order
        for name, value in named.items():
            rows = (~torch.isfinite(value.float())).flatten(1).any(1) if value.ndim > 1 else ~torch.isfinite(value)
            if bool(rows.any()):
                where = "features" if name == "features" else f"teacher ({name})"
                return DataError(
                    f"step {step}: the {where} of {source.place(index)} are not finite from row "
                    f"{int(rows.nonzero()[0])} on; extract them again, or leave that conversation out"
                )
        if not suspect and not torch.isfinite(torch.tensor(loss(batch))):
            suspect = source.place(index)
    if suspect:
        return DataError(
            f"step {step}: the loss of {suspect} is not finite though its features are; lower train.optimizer."
            "learning_rate, or look at that conversation"
        )
    return DataError(
        f"step {step}: the gradient is not finite though all features and losses are; lower "
        "train.optimizer.learning_rate"
    )
