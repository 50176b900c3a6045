from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sstf.targets import PreallocatedCache, Target, causal_mask
from sstf.trees import ancestor_mask, depths


def logits_of(target: Target, ids: list[int]) -> Tensor:
    """From scratch, by transformers itself. [seq, vocab]"""
    with torch.inference_mode():
        found: Tensor = target.model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


@torch.inference_mode()
def run(target: Target, cache: PreallocatedCache, ids: list[int], parents: list[int] | None = None) -> Tensor:
    """Logits of `ids` behind what the cache holds: a line of text, or a tree whose root is the first id."""
    past, count = cache.get_seq_length(), len(ids)
    mask = torch.ones(count, past + count, dtype=torch.bool).tril(past)
    positions = torch.arange(past, past + count)
    if parents is not None:
        within = ancestor_mask(torch.tensor(parents))
        mask[1:, past + 1 :] = within
        positions = torch.cat([torch.tensor([past]), past + depths(within)])
    found: Tensor = target.model(
        torch.tensor([ids]),
        attention_mask=mask[None, None],
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    return found


PROMPT = [7, 120, 33, 250, 4, 9]
# Root 50; its children 11, 12; 21 and 22 below 12; 31 below 22.
TREE, PARENTS = [50, 11, 12, 21, 22, 31], [-1, -1, 1, 1, 3]
PATHS = [[50], [50, 11], [50, 12], [50, 12, 21], [50, 12, 22], [50, 12, 22, 31]]


def test_each_node_sees_its_own_path_only(tiny_target: Target) -> None:
    cache = tiny_target.new_cache(20)
    torch.testing.assert_close(run(tiny_target, cache, PROMPT), logits_of(tiny_target, PROMPT), atol=1e-5, rtol=1e-4)
    cache.write_behind(len(PROMPT))
    found = run(tiny_target, cache, TREE, PARENTS)
    for row, path in enumerate(PATHS):
        expected = logits_of(tiny_target, [*PROMPT, *path])[-1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4, 5]])
def test_keep_is_as_if_the_rest_had_never_been(kept: list[int], tiny_target: Target) -> None:
    cache = tiny_target.new_cache(20)
    run(tiny_target, cache, PROMPT)
    cache.write_behind(len(PROMPT))
    run(tiny_target, cache, TREE, PARENTS)
    cache.keep(torch.tensor(kept))
    assert cache.get_seq_length() == len(PROMPT) + len(kept)
    text = [*PROMPT, *(TREE[i] for i in kept), 77, 88]
    found = run(tiny_target, cache, [77, 88])
    torch.testing.assert_close(found, logits_of(tiny_target, text)[-2:], atol=1e-5, rtol=1e-4)
    # And the keys themselves.
    fresh = tiny_target.new_cache(20)
    run(tiny_target, fresh, text[:-2])
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        end = cache.get_seq_length()
        assert one.keys is not None and other.keys is not None and one.values is not None and other.values is not None
        torch.testing.assert_close(one.keys[:, :, :end], other.keys[:, :, :end], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.values[:, :, :end], other.values[:, :, :end], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_nothing_is_allocated_after_the_first_pass(tiny_target: Target) -> None:
    cache = tiny_target.new_cache(20)
    run(tiny_target, cache, PROMPT)
    cache.write_behind(len(PROMPT))
    before = [layer.keys.data_ptr() for layer in cache.layers if layer.keys is not None]
    run(tiny_target, cache, TREE, PARENTS)
    cache.keep(torch.tensor([0, 2]))
    assert [layer.keys.data_ptr() for layer in cache.layers if layer.keys is not None] == before
    assert len(before) == 8


def test_rows_at_positions_of_their_own(tiny_target: Target) -> None:
    """Three texts of different lengths, written into rows 2, 0, 1, then one token each."""
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    rows = torch.tensor([2, 0, 1])
    cache = tiny_target.new_cache(10, batch=3)

    @torch.inference_mode()
    def step(rows: Tensor, ids: Tensor, positions: Tensor, visible: int) -> Tensor:
        cache.write_rows(rows, positions, visible)
        found: Tensor = tiny_target.model(
            ids, attention_mask=causal_mask(positions, visible)[:, None], position_ids=positions, past_key_values=cache
        ).logits
        return found

    # Rows one after the other, as a refill does.
    for row, text in zip(rows.tolist(), texts, strict=True):
        found = step(torch.tensor([row]), torch.tensor([text]), torch.arange(len(text))[None], len(text))
        torch.testing.assert_close(found[0], logits_of(tiny_target, text), atol=1e-5, rtol=1e-4)
    order = [texts[rows.tolist().index(row)] for row in range(3)]
    for chosen in (torch.arange(3), torch.tensor([0, 2])):
        where = [order[row] for row in chosen.tolist()]
        positions = torch.tensor([[len(text)] for text in where])
        found = step(chosen, torch.full((len(chosen), 1), 99), positions, 5)
        for i, text in enumerate(where):
            torch.testing.assert_close(found[i, 0], logits_of(tiny_target, [*text, 99])[-1], atol=1e-5, rtol=1e-4)


def test_neighbouring_rows_are_read_without_a_copy(tiny_target: Target) -> None:
    cache = tiny_target.new_cache(10, batch=4)
    layer, states = cache.layers[0], torch.randn(2, 2, 3, 16)
    positions, rows = torch.arange(3).expand(2, 3), torch.tensor([1, 2])
    for block in (None, slice(1, 3)):
        cache.write_rows(rows, positions, 3, block)
        keys, values = layer.update(states, 2 * states)
        assert torch.equal(keys, states) and torch.equal(values, 2 * states)
        assert layer.keys is not None
        shared = keys.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
        assert shared == (block is not None)


def test_causal_mask_by_hand() -> None:
    mask = causal_mask(torch.tensor([[0, 1], [2, 3]]), 4)
    assert mask.shape == (2, 2, 4)
    assert mask.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
