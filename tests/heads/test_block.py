from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstf.heads import BlockHead, BlockShape
from sstf.heads.block import block_attention

SHAPE = BlockShape(
    hidden_size=24, taps=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, intermediate_size=20, vocab_size=40,
    rms_norm_eps=1e-5, rope_theta=100.0, max_position_embeddings=128, rope_scaling=None, block_size=4, first_slot=1,
)  # fmt: skip


def random_head(shape: BlockShape = SHAPE) -> BlockHead:
    torch.manual_seed(0)
    head = BlockHead(shape, torch.randn(40, 24), torch.randn(40, 24), torch.arange(0, 40, 2), 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return head


def text(lengths: tuple[int, ...], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(sum(lengths), 48, generator=generator),
        torch.randint(40, (sum(lengths),), generator=generator),
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple))
def test_many_blocks_at_once_are_each_block_alone(data: st.DataObject, lengths: tuple[int, ...]) -> None:
    """Values and all gradients, however the blocks are cut into chunks, for odd lengths and grouped heads."""
    head = random_head(replace(SHAPE, first_slot=data.draw(st.integers(0, 1))))
    rows = sorted(data.draw(st.sets(st.integers(0, sum(lengths) - 1), min_size=1)))
    scores = data.draw(st.sampled_from([1, 24 * 8, 24 * 60, 2**20]))
    features, tokens = text(lengths)
    features.requires_grad_()
    found = head.fill(features, tokens, lengths, rows, scores)
    expected = head.fill_reference(features, tokens, lengths, rows)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert found.shape == (len(rows), head.shape.drafts, 24)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    wanted = [*head.parameters(), features]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        assert float((one - other).norm()) <= 1e-4 * max(1.0, float(other.norm()))


@torch.no_grad()
def test_a_block_sees_its_own_past_and_nothing_else() -> None:
    """Later features, later tokens and other documents change nothing; earlier features and the anchor do. (Tokens
    before the anchor are known by their features alone.)"""
    head, lengths = random_head(), (5, 7, 3)
    features, tokens = text(lengths)
    row = 5 + 3
    before = head.fill(features, tokens, lengths, [row])
    other_features, other_tokens = features.clone(), tokens.clone()
    other_features[[*range(5), *range(row + 1, 15)]] += 9
    other_tokens[[i for i in range(15) if i != row]] += 1
    other_tokens %= 40
    assert torch.equal(head.fill(other_features, other_tokens, lengths, [row]), before)
    for seen in range(5, row + 1):
        nearer = features.clone()
        nearer[seen] += 1
        assert float((head.fill(nearer, tokens, lengths, [row]) - before).abs().max()) > 1e-3
    tokens[row] = (tokens[row] + 1) % 40
    assert float((head.fill(features, tokens, lengths, [row]) - before).abs().max()) > 1e-3


def test_slots_see_each_other_in_both_directions() -> None:
    """With two masks swapped for real tokens the embeddings differ; attention to later slots is what is looked at."""
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 3, heads, 8) for heads in (4, 2, 2))
    past = torch.randn(2, 2, 8)
    seen = torch.ones(1, 2, dtype=torch.bool)
    found = block_attention(query, keys, values, past, past, seen)
    later = values.clone()
    later[0, 2] += 1
    changed = block_attention(query, keys, later, past, past, seen)
    assert float((changed - found)[0, 0].abs().min()) > 0


def test_attention_by_torchs_own() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(5, 3, heads, 8) for heads in (6, 2, 2))
    past_keys, past_values = torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    mask = torch.rand(5, 7) < 0.5
    found = block_attention(query, keys, values, past_keys, past_values, mask)
    for block in range(5):
        every = torch.cat([past_keys[mask[block]], keys[block]]), torch.cat([past_values[mask[block]], values[block]])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[block].transpose(0, 1), *(one.transpose(0, 1) for one in every), enable_gqa=True
        )
        torch.testing.assert_close(found[block], expected.transpose(0, 1))


def test_names_are_those_of_published_checkpoints() -> None:
    """As in checkpoints of DFlashDraftModel; the buffers are ours."""
    names = set(random_head().state_dict())
    layer = {
        *(f"self_attn.{name}_{kind}.weight" for name in "qk" for kind in ("proj", "norm")),
        *(f"self_attn.{name}_proj.weight" for name in "vo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    wanted = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == wanted | {"fc.weight", "hidden_norm.weight", "norm.weight"} | {"d2t", "t2d", "mask_token"}


def test_no_rows() -> None:
    """A micro-batch without a trained row has a loss of 0 in which all parameters take part."""
    head = random_head()
    features, tokens = text((4, 2))
    found = head.fill(features, tokens, (4, 2), [])
    assert found.shape == (0, 3, 24)
    assert all(float(grad.abs().max()) == 0 for grad in torch.autograd.grad(found.sum(), list(head.parameters())))


def test_memory_grows_with_the_text_and_not_with_its_square() -> None:
    """What a loss keeps for its backward pass, of twice the text with twice the blocks."""

    def kept(length: int) -> int:
        head = random_head()
        features, tokens = text((length,))
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = head.fill(features, tokens, (length,), list(range(length)))
        del out
        return sum(sizes.values())

    assert kept(1024) < 2.3 * kept(512)


@pytest.mark.parametrize("first_slot", [0, 1])
def test_shape_counts_its_drafts(first_slot: int) -> None:
    assert replace(SHAPE, first_slot=first_slot).drafts == 4 - first_slot
