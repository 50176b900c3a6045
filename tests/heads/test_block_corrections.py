from __future__ import annotations

import pytest
import torch
from test_block import SHAPE

from sstf.heads import DominoHead, DSparkHead

DRAFT_TOKENS = torch.arange(0, 40, 2)


def domino() -> DominoHead:
    torch.manual_seed(0)
    return DominoHead(SHAPE, torch.randn(40, 24), torch.randn(40, 24), DRAFT_TOKENS, 3, gru_size=10, rank=6)


def dspark() -> DSparkHead:
    torch.manual_seed(0)
    return DSparkHead(SHAPE, torch.randn(40, 24), torch.randn(40, 24), DRAFT_TOKENS, 3, rank=6)


@torch.no_grad()
def test_the_gru_is_torchs() -> None:
    head = domino()
    tokens = torch.randint(40, (5, 7))
    expected, _ = head.prefix_gru(head.embed(tokens))
    torch.testing.assert_close(head.paths(tokens), expected)
    state = head.path_start(tokens[:, 0])
    for i in range(1, 7):
        state = head.path_next(state, tokens[:, i])
        torch.testing.assert_close(state, expected[:, i])


@torch.no_grad()
def test_domino_by_hand() -> None:
    head = domino()
    hidden, state = torch.randn(3, 24), torch.randn(3, 10)
    expected = head.embed_proj(torch.cat([hidden, state], -1))
    torch.testing.assert_close(head.low_rank(hidden, state) @ head.correction.T, expected)
    assert head.correction.shape == (20, 6)


@torch.no_grad()
def test_dspark_by_hand() -> None:
    """The token before alone counts."""
    head = dspark()
    tokens = torch.randint(40, (5, 4))
    markov = head.markov_head
    states = head.paths(tokens)
    assert torch.equal(states, markov.markov_w1.weight[tokens])
    assert torch.equal(head.low_rank(torch.randn(5, 4, 24), states) @ head.correction.T, markov.markov_w2(states))
    hidden = torch.randn(5, 4, 24)
    proj = head.confidence_head.proj
    torch.testing.assert_close(head.confidence(hidden, states), proj(torch.cat([hidden, states], -1))[..., 0])


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (
            domino(),
            {"prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight"},
        ),
        (
            dspark(),
            {
                "markov_head.markov_w1.weight",
                "markov_head.markov_w2.weight",
                "confidence_head.proj.weight",
                "confidence_head.proj.bias",
            },
        ),
    ],
    ids=["domino", "dspark"],
)
def test_names_are_those_of_published_checkpoints(head: torch.nn.Module, names: set[str]) -> None:
    """Beside the backbone's."""
    own = {name for name in head.state_dict() if not name.startswith(("layers.", "fc.", "hidden_norm.", "norm."))}
    assert own == names | {"d2t", "t2d", "mask_token"}
