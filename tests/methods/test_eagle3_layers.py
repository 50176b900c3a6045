"""EAGLE-3 heads of several layers; those of one are in `test_eagle3.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drafted_rows import (
    DRAFT_TOKENS,
    Drafts,
    causal,
    check_batch_drafts_as_alone,
    check_by_heart,
    check_drafts_as_trained,
    check_loss,
    check_no_leak,
    check_packing,
    learn_by_heart,
    make_batch,
    naive_loss,
)
from torch import Tensor
from torch.nn import functional as F

from sstf.features import rows_ahead
from sstf.heads import Eagle3Head
from sstf.losses import Kl, LkAlpha, Objective
from sstf.methods import Eagle3Config
from sstf.methods.checkpoint import bind, read_head, save_head
from sstf.methods.eagle3 import Eagle3Method
from sstf.targets import Target
from sstf.trees import AnyTree, Chain, DynamicTree, StaticTree
from sstf.types import FeatureBatch

STEPS = 3
TAPS = 192


def make_method(**changes: object) -> Eagle3Method:
    fields = {"ttt_steps": STEPS, "draft_vocab_size": 150, "num_layers": 2}
    return Eagle3Method(Eagle3Config.model_validate(fields | changes))


def random_head(target: Target, **changes: object) -> Eagle3Head:
    torch.manual_seed(1)
    found = make_method(**changes).build_head(target.spec, target.frozen_head, DRAFT_TOKENS)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.12)
    return found


def test_a_number_of_layers_that_is_one_is_not_written() -> None:
    assert "num_layers" not in Eagle3Config().model_dump(mode="json")
    assert Eagle3Config().model_dump(mode="json", include={"kind", "layers"}) == {"kind": "eagle3", "layers": None}
    several = Eagle3Config(num_layers=3)
    assert several.model_dump(mode="json")["num_layers"] == 3
    assert Eagle3Config.model_validate_json(several.model_dump_json()) == several


def test_state_dict_has_names_that_vllm_reads(tiny_target: Target) -> None:
    """`midlayer` is its `layers.0`; later layers are Llama's, without hidden_norm and reading H."""
    state = {name: tuple(tensor.shape) for name, tensor in random_head(tiny_target).state_dict().items()}
    assert state["midlayer.self_attn.q_proj.weight"] == (64, 128)
    assert {name: shape for name, shape in state.items() if name.startswith("layers.")} == {
        "layers.1.input_layernorm.weight": (64,),
        "layers.1.self_attn.q_proj.weight": (64, 64),
        "layers.1.self_attn.k_proj.weight": (32, 64),
        "layers.1.self_attn.v_proj.weight": (32, 64),
        "layers.1.self_attn.o_proj.weight": (64, 64),
        "layers.1.post_attention_layernorm.weight": (64,),
        "layers.1.mlp.gate_proj.weight": (128, 64),
        "layers.1.mlp.up_proj.weight": (128, 64),
        "layers.1.mlp.down_proj.weight": (64, 128),
    }


@torch.no_grad()
def test_later_layers_change_nothing_at_the_start(tiny_target: Target) -> None:
    batch = make_batch(tiny_target.frozen_head, (9,), TAPS)
    ahead, _ = rows_ahead((9,), STEPS, torch.device("cpu"))
    one, three = (
        make_method(num_layers=layers).build_head(tiny_target.spec, tiny_target.frozen_head, DRAFT_TOKENS)
        for layers in (1, 3)
    )
    three.load_state_dict(one.state_dict(), strict=False)  # what starts at random
    found, expected = (head.unroll(head.fuse(batch.features), batch.input_ids, (9,), ahead) for head in (three, one))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- unrolling -------------------------------------------------------------------------------------------------------

LENGTHS = (4, 9, 1, 2)


@pytest.mark.parametrize("variant", [{}, {"norm_before_residual": True, "norm_output": True}])
@pytest.mark.parametrize("rows", [list(range(16)), [0, 3, 4, 5, 8, 12, 13, 15], [7], []])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unroll_as_its_definition(steps: int, rows: list[int], variant: dict[str, object], tiny_target: Target) -> None:
    """Linear attention and that of the whole score matrix: outputs and the gradient of everything that has one."""
    head = random_head(tiny_target, num_layers=3, **variant)
    g = torch.randn(16, 64, requires_grad=True)
    tokens = torch.randint(300, (16,))
    leaves = {name: weight for name, weight in head.named_parameters() if "layer" in name} | {"g": g}
    ahead, _ = rows_ahead(LENGTHS, steps, torch.device("cpu"))
    weights = torch.randn(steps, len(rows), 64)
    found, expected = (run(g, tokens, LENGTHS, ahead[:, rows]) for run in (head.unroll, head.unroll_reference))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    grads = (torch.autograd.grad((outs * weights).sum(), list(leaves.values())) for outs in (found, expected))
    for name, one, other in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5 * max(1.0, float(other.abs().max())), rtol=0, msg=name)


def test_one_layer_by_autograd_is_the_layer_by_hand(tiny_target: Target) -> None:
    """The general path, made to run one layer, against the one that is written for it."""
    head = random_head(tiny_target, num_layers=1)
    g, tokens = torch.randn(16, 64), torch.randint(300, (16,))
    ahead, _ = rows_ahead(LENGTHS, 4, torch.device("cpu"))
    torch.testing.assert_close(
        head.unroll(g, tokens, LENGTHS, ahead), head.unroll_reference(g, tokens, LENGTHS, ahead), atol=1e-4, rtol=1e-4
    )


def test_unroll_in_bfloat16_stays_near_its_definition_in_float32(tiny_target: Target) -> None:
    """Under autocast, with float32 masters, as near as the same layers with attention by its definition."""
    head = random_head(tiny_target)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.7)
    g, tokens, rows = torch.randn(16, 64), torch.randint(300, (16,)), torch.arange(0, 16, 2)
    ahead, _ = rows_ahead(LENGTHS, STEPS, torch.device("cpu"))
    weights = torch.randn(STEPS, len(rows), 64)
    parameters = {name: weight for name, weight in head.named_parameters() if "layer" in name}

    def run(how: str, low: bool) -> list[Tensor]:
        leaf = (g.bfloat16() if low else g).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            outs = getattr(head, how)(leaf, tokens, LENGTHS, ahead[:, rows])
        assert outs.dtype == leaf.dtype
        return [outs.detach(), *torch.autograd.grad((outs * weights).sum(), [leaf, *parameters.values()])]

    exact = run("unroll_reference", low=False)
    ours, plain = run("unroll", low=True), run("unroll_reference", low=True)
    for name, one, other, right in zip(["out", "g", *parameters], ours, plain, exact, strict=True):
        error, usual = (float((found.float() - right).norm() / right.norm()) for found in (one, other))
        assert error < max(0.01, 1.2 * usual), (name, error, usual)


def test_memory_grows_with_the_rows_not_with_their_square(tiny_target: Target) -> None:
    """What the graph keeps for twice the text is twice as much; whole score matrices would be four times."""
    head = random_head(tiny_target)

    def kept(length: int) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        g, tokens = torch.randn(length, 64), torch.zeros(length, dtype=torch.int64)
        ahead, _ = rows_ahead((length,), STEPS, torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            head.unroll(g, tokens, (length,), ahead)
        return sum(seen.values())

    weights = kept(8)
    assert kept(1600) - weights == pytest.approx(2 * (kept(800) - weights), rel=0.05)


# ---- loss and drafting -----------------------------------------------------------------------------------------------


def drafts_of(head: Eagle3Head) -> Drafts:
    layers = [head.midlayer, *head.later_layers]

    def drafts(document: FeatureBatch, t: int) -> Tensor:
        (seq,) = document.lengths
        g = list(head.fc(document.features[: t + 1]))
        found = []
        for step in range(min(STEPS, seq - t)):
            tokens, positions = document.input_ids[: t + 1 + step], torch.arange(t + 1 + step)
            out = causal(layers, head.embeddings[tokens], torch.stack(g), head.rope(positions))[-1]
            g.append(F.rms_norm(out, (64,), head.norm.weight, 1e-6) if head.shape.norm_output else out)
            found.append(F.rms_norm(out, (64,), head.norm.weight, 1e-6))
        return torch.stack(found)

    return drafts


@pytest.mark.parametrize(
    ("changes", "objective"),
    [({"num_layers": 2}, Kl()), ({"num_layers": 3, "norm_output": True}, LkAlpha()), ({"num_layers": 1}, Kl())],
)
def test_loss_as_a_naive_loop(changes: dict[str, object], objective: Objective, tiny_target: Target) -> None:
    frozen, method = tiny_target.frozen_head, make_method(ttt_decay=0.6, **changes)
    method.config = method.config.model_copy(update={"objective": objective})
    head, batch = random_head(tiny_target, **changes), make_batch(frozen, (11, 1, 4, 8), TAPS, 0.9)
    expected = naive_loss(
        batch, frozen, DRAFT_TOKENS, head.lm_head.weight, drafts_of(head), objective, [0.6**i for i in range(STEPS)]
    )
    check_loss(method.loss(head, batch, frozen), expected, head)


@pytest.mark.parametrize("lengths", [(11, 4, 8), (1, 1, 13), (2, 9)])
def test_packed_is_the_sum_of_its_documents(lengths: tuple[int, ...], tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    check_packing(make_method(), random_head(tiny_target), make_batch(frozen, lengths, TAPS, 0.9), frozen)


def test_the_future_is_not_seen(tiny_target: Target) -> None:
    frozen = tiny_target.frozen_head
    check_no_leak(make_method(), random_head(tiny_target), make_batch(frozen, (13,), TAPS, 0.9), frozen)


@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"num_layers": 3, "norm_output": True}])
def test_what_is_trained_is_what_is_drafted(changes: dict[str, object], tiny_target: Target) -> None:
    check_drafts_as_trained(make_method(**changes), random_head(tiny_target, **changes), tiny_target.frozen_head, TAPS)


@pytest.mark.parametrize(
    "policy", [Chain(depth=4), DynamicTree(depth=4, top_k=3, total_tokens=9), StaticTree.full(3, 2)]
)
def test_a_batch_drafts_what_each_sequence_drafts_alone(policy: AnyTree, tiny_target: Target) -> None:
    check_batch_drafts_as_alone(make_method(), random_head(tiny_target), policy, TAPS)


def test_texts_learned_by_heart_are_drafted(tiny_target: Target, tmp_path: Path) -> None:
    config = Eagle3Config(ttt_steps=2, draft_vocab_size=300, num_layers=2)
    head, samples = learn_by_heart(
        Eagle3Method(config), config, tiny_target, tmp_path, 120, kind="muon", learning_rate=2e-2
    )
    for policy in (Chain(depth=2), DynamicTree(depth=2, top_k=2, total_tokens=5)):
        check_by_heart(head, samples, tiny_target, policy, 2.7)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(tiny_target: Target, tmp_path: Path) -> None:
    head, config = random_head(tiny_target), make_method().config
    save_head(tmp_path, config, head, tiny_target.spec, {})
    stored = read_head(tmp_path)
    assert stored.config == config
    for name, tensor in bind(stored, tiny_target.frozen_head).state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name]), name
