from __future__ import annotations

import torch

from sstf.losses import accepted_drafts


def test_accepted_drafts_stop_at_the_first_miss() -> None:
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert accepted_drafts(hits).tolist() == [3, 1, 0, 2]
    assert accepted_drafts(hits[:, :0]).tolist() == []
