"""Optimisers: who moves what, Muon against a reference by singular values, state by name to the bit."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors
from torch import Tensor, nn

from sstf.config_loading import Section, load
from sstf.errors import ConfigError, DamagedDataError
from sstf.heads.eagle import Eagle3Head, EagleShape
from sstf.train import optim
from sstf.train.config import TrainConfig
from sstf.train.optim import (
    AdamWConfig,
    MuonConfig,
    OptimizerConfig,
    build_optimizers,
    check_optimizer_fits,
    load_state_by_name,
    state_by_name,
)

KINDS: list[OptimizerConfig] = [
    AdamWConfig(learning_rate=3e-3, weight_decay=0.1),
    MuonConfig(learning_rate=3e-3, weight_decay=0.1),
]
both_kinds = pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)

BODY = {"fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def make_head(seed: int = 0) -> Eagle3Head:
    shape = EagleShape(
        hidden_size=32,
        taps=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        draft_vocab_size=40,
        vocab_size=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    return Eagle3Head(shape, torch.randn(64, 32), torch.arange(40))


def train(head: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    """Gradients are a function of the weights and of the step, so that any difference in the weights goes on."""
    for step in steps:
        for name, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step * 1000 + len(name)))
            parameter.grad = (5 * parameter.detach()).sin() + noise
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] / (step + 1)
            optimizer.step()
            optimizer.zero_grad()


def test_examples() -> None:
    result = doctest.testmod(optim)
    assert result.attempted > 0 and result.failed == 0


# ---- who moves what --------------------------------------------------------------------------------------------------


def groups_by_name(head: nn.Module, config: OptimizerConfig) -> dict[str, tuple[str, float, float]]:
    """Parameter name -> (optimiser, weight decay, peak)."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in head.named_parameters()}
    return {
        names[parameter]: (type(optimizer).__name__, group["weight_decay"], group["peak_lr"])
        for optimizer in build_optimizers(config, head.named_parameters())
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@both_kinds
def test_every_parameter_is_moved_once_and_norms_are_never_decayed(config: OptimizerConfig) -> None:
    head = make_head()
    moved = [
        parameter
        for optimizer in build_optimizers(config, head.named_parameters())
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(map(id, moved)) == sorted(map(id, head.parameters()))
    for name, (kind, decay, peak) in groups_by_name(head, config).items():
        layer = name.split(".")[-2]
        assert decay == (0.0 if "norm" in layer else 0.1), name
        assert kind == ("Muon" if config.kind == "muon" and layer in BODY else "AdamW"), name
        assert peak == 3e-3


def test_settings_reach_the_optimisers() -> None:
    config = MuonConfig(learning_rate=0.25, betas=(0.5, 0.75), eps=1e-3, momentum=0.5, ns_steps=3)
    muon, adamw = build_optimizers(config, make_head().named_parameters())
    assert {key: muon.defaults[key] for key in ("lr", "momentum", "ns_steps", "nesterov", "adjust_lr_fn")} == {
        "lr": 0.25,
        "momentum": 0.5,
        "ns_steps": 3,
        "nesterov": True,
        "adjust_lr_fn": "match_rms_adamw",
    }
    assert {key: adamw.defaults[key] for key in ("lr", "betas", "eps", "fused")} == {
        "lr": 0.25,
        "betas": (0.5, 0.75),
        "eps": 1e-3,
        "fused": True,
    }


def test_adamw_by_hand() -> None:
    """First step: both moments, corrected, are the gradient and its square, so the move is lr * sign(gradient)."""
    weight = nn.Parameter(torch.tensor([[2.0, -4.0]]))
    norm = nn.Parameter(torch.tensor([1.0]))
    (optimizer,) = build_optimizers(
        AdamWConfig(learning_rate=0.1, weight_decay=0.5), [("fc.weight", weight), ("norm.weight", norm)]
    )
    weight.grad, norm.grad = torch.tensor([[3.0, -0.5]]), torch.tensor([8.0])
    optimizer.step()
    # Decay first: * (1 - 0.1 * 0.5), of the matrix only.
    assert torch.allclose(weight, torch.tensor([[2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1]]))
    assert torch.allclose(norm, torch.tensor([1.0 - 0.1]))


# ---- Muon against a reference ----------------------------------------------------------------------------------------


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """What Newton-Schulz does, said by singular values: s / |update| goes `steps` times through a polynomial."""
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 16)])
def test_muon_is_the_reference(shape: tuple[int, int]) -> None:
    """Three steps of momentum 0.9, Nesterov, decay 0.1; bfloat16 rounds the Newton-Schulz steps."""
    random = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(shape, generator=random))
    expected, momentum = weight.detach().double().clone(), torch.zeros(shape, dtype=torch.float64)
    config = MuonConfig(learning_rate=0.02, weight_decay=0.1, momentum=0.9)
    (optimizer,) = build_optimizers(config, [("fc.weight", weight)])
    for _ in range(3):
        before, was = weight.detach().double().clone(), expected.clone()
        gradient = torch.randn(shape, generator=random)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        update = 0.9 * momentum + 0.1 * gradient.double()
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(shape) ** 0.5 * orthogonalised(update)
        moved, meant = weight.detach().double() - before, expected - was
        assert float((moved - meant).norm() / meant.norm()) < 0.03  # 0.6 to 2.2 % seen
    assert float((weight.detach().double() - expected).norm() / expected.norm()) < 1e-3


def test_muon_by_hand() -> None:
    """Of 4 equal singular values each is 1/2 of the norm; the polynomial takes 1/2 to 1.189 (see below) five times."""
    weight = nn.Parameter(torch.zeros(4, 4))
    (optimizer,) = build_optimizers(MuonConfig(learning_rate=0.5, ns_steps=1), [("fc.weight", weight)])
    weight.grad = 7.0 * torch.eye(4).roll(1, 0)  # a permutation is orthogonal already; its size does not matter
    optimizer.step()
    # One step: 3.4445/2 - 4.7750/8 + 2.0315/32 = 1.18886; times lr 0.5 and 0.2 * sqrt(4).
    assert torch.allclose(weight, -0.5 * 0.4 * 1.18886 * torch.eye(4).roll(1, 0), rtol=0.01)


def test_muon_moves_as_far_as_adamw() -> None:
    """That is what lets both share a learning rate: root mean square about 0.2 * lr a step."""
    random = torch.Generator().manual_seed(2)
    for shape in ((64, 192), (192, 64)):
        weight = nn.Parameter(torch.zeros(shape))
        (optimizer,) = build_optimizers(MuonConfig(learning_rate=0.1), [("fc.weight", weight)])
        weight.grad = torch.randn(shape, generator=random)
        optimizer.step()
        assert 0.16 < float(weight.detach().square().mean().sqrt()) / 0.1 < 0.22


@both_kinds
def test_learns(config: OptimizerConfig) -> None:
    """A linear map is found: the loss falls a hundredfold."""
    random = torch.Generator().manual_seed(3)
    truth, weight = torch.randn(16, 24, generator=random), nn.Parameter(torch.zeros(16, 24))
    optimizers = build_optimizers(config.model_copy(update={"weight_decay": 0.0}), [("fc.weight", weight)])
    losses = []
    for step in range(400):
        inputs = torch.randn(64, 24, generator=random)
        loss = (inputs @ (weight - truth).T).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 - step / 400)
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] / 100


# ---- state -----------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("saved_at", [0, 3])
def test_goes_on_as_if_unbroken(config: OptimizerConfig, saved_at: int) -> None:
    unbroken = make_head()
    optimizers = build_optimizers(config, unbroken.named_parameters())
    train(unbroken, optimizers, range(saved_at))
    weights = write_safetensors(unbroken.state_dict())
    saved = write_safetensors(state_by_name(optimizers, unbroken.named_parameters()))
    train(unbroken, optimizers, range(saved_at, 7))

    resumed = make_head(seed=9)
    resumed.load_state_dict(read_safetensors(weights))
    fresh = build_optimizers(config, resumed.named_parameters())
    load_state_by_name(fresh, resumed.named_parameters(), read_safetensors(saved))
    train(resumed, fresh, range(saved_at, 7))

    for (name, one), two in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name
    one_state = state_by_name(optimizers, unbroken.named_parameters())
    two_state = state_by_name(fresh, resumed.named_parameters())
    assert one_state.keys() == two_state.keys()
    assert all(torch.equal(one_state[key], two_state[key]) for key in one_state)


def test_state_keys() -> None:
    head = make_head()
    keys = state_by_name(build_optimizers(KINDS[0], head.named_parameters()), head.named_parameters()).keys()
    names = [name for name, _ in head.named_parameters()]
    assert keys == {f"{s}.{n}" for s, n in itertools.product(("step", "exp_avg", "exp_avg_sq"), names)}
    keys = state_by_name(build_optimizers(KINDS[1], head.named_parameters()), head.named_parameters()).keys()
    assert "momentum_buffer.midlayer.self_attn.q_proj.weight" in keys
    assert "exp_avg.lm_head.weight" in keys
    assert len(keys) == len(BODY) + 3 * (len(names) - len(BODY))


@both_kinds
def test_state_does_not_depend_on_the_order_of_parameters(config: OptimizerConfig) -> None:
    head, other = make_head(), make_head()
    optimizers = build_optimizers(config, head.named_parameters())
    train(head, optimizers, range(2))
    state = state_by_name(optimizers, head.named_parameters())
    reversed_names = list(other.named_parameters())[::-1]
    backwards = build_optimizers(config, reversed_names)
    load_state_by_name(backwards, reversed_names, state)
    other.load_state_dict(head.state_dict())
    train(head, optimizers, range(2, 4))
    train(other, backwards, range(2, 4))
    assert all(torch.equal(one, two) for one, two in zip(head.parameters(), other.parameters(), strict=True))


def test_a_loaded_state_is_a_copy() -> None:
    head, other = make_head(), make_head()
    optimizers = build_optimizers(KINDS[0], head.named_parameters())
    train(head, optimizers, range(2))
    state = {key: value.clone() for key, value in state_by_name(optimizers, head.named_parameters()).items()}
    kept = {key: value.clone() for key, value in state.items()}
    fresh = build_optimizers(KINDS[0], other.named_parameters())
    load_state_by_name(fresh, other.named_parameters(), state)
    train(other, fresh, range(2))
    assert all(torch.equal(state[key], kept[key]) for key in state)


def test_loading_keeps_the_learning_rate_of_the_configuration() -> None:
    head = make_head()
    old = build_optimizers(AdamWConfig(learning_rate=0.5), head.named_parameters())
    new = build_optimizers(AdamWConfig(learning_rate=0.25), head.named_parameters())
    load_state_by_name(new, head.named_parameters(), state_by_name(old, head.named_parameters()))
    assert [group["peak_lr"] for group in new[0].param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("saved", "asked"), [(0, 1), (1, 0)])
def test_state_of_another_kind(saved: int, asked: int) -> None:
    head = make_head()
    state = state_by_name(build_optimizers(KINDS[saved], head.named_parameters()), head.named_parameters())
    kinds = KINDS[saved].kind, KINDS[asked].kind
    with pytest.raises(DamagedDataError) as caught:
        load_state_by_name(build_optimizers(KINDS[asked], head.named_parameters()), head.named_parameters(), state)
    assert str(caught.value) == (
        f"the checkpoint's optimiser state is of {kinds[0]}, the configuration asks for {kinds[1]}; set "
        f"train.optimizer.kind to {kinds[0]}, or train in another folder"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("exp_avg.fc.weight"), "lacks exp_avg.fc.weight; go on from an earlier checkpoint"),
        (lambda state: state.clear(), "lacks exp_avg.fc.weight, exp_avg.lm_head.weight, .* and 36 more;"),
        (lambda state: state.update({"step.extra": torch.zeros(())}), "holds step.extra, of no parameter"),
        (lambda state: state.update({"exp_avg.fc.weight": torch.zeros(3)}), "another shape in exp_avg.fc.weight"),
    ],
)
def test_damaged_state(change: object, says: str) -> None:
    head = make_head()
    optimizers = build_optimizers(KINDS[0], head.named_parameters())
    state = state_by_name(optimizers, head.named_parameters())
    change(state)  # type: ignore[operator]
    with pytest.raises(DamagedDataError, match=says) as caught:
        load_state_by_name(optimizers, head.named_parameters(), state)
    assert "\n" not in str(caught.value)


# ---- refusals --------------------------------------------------------------------------------------------------------


@both_kinds
def test_masters_are_float32(config: OptimizerConfig) -> None:
    head = make_head()
    head.norm.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"norm\.weight is torch\.bfloat16, but the optimiser needs float32"):
        build_optimizers(config, head.named_parameters())
    with pytest.raises(ConfigError, match="no parameters to train"):
        build_optimizers(config, [])


@pytest.mark.parametrize("parallel", ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_muon_needs_whole_matrices(parallel: str) -> None:
    check_optimizer_fits(AdamWConfig(), parallel)
    if parallel in ("single", "ddp"):
        check_optimizer_fits(MuonConfig(), parallel)
        return
    with pytest.raises(ConfigError, match=f"whole matrices, but {parallel} gives each process a piece.*use adamw"):
        check_optimizer_fits(MuonConfig(), parallel)


class Root(Section):
    train: TrainConfig


def read(tmp_path: Path, optimizer: str, *overrides: str) -> OptimizerConfig:
    path = tmp_path / "run.yaml"
    path.write_text(f"train:\n  optimizer: {optimizer}\n  steps: 5\n", encoding="utf-8")
    return load(Root, path, overrides).train.optimizer


def test_config(tmp_path: Path) -> None:
    assert read(tmp_path, "{learning_rate: 1e-3}") == AdamWConfig(learning_rate=1e-3)
    assert read(tmp_path, "{kind: muon, learning_rate: 1e-3, betas: [0.8, 0.9]}") == MuonConfig(
        learning_rate=1e-3, betas=(0.8, 0.9)
    )
    # What is common to both survives the change of kind.
    changed = read(tmp_path, "{kind: adamw, learning_rate: 1e-3, weight_decay: 0.1}", "train.optimizer.kind=muon")
    assert changed == MuonConfig(learning_rate=1e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{kind: adamw, learning_rate: 0}", "learning_rate: expected a number above 0.0, found 0 (integer)"),
        (
            "{kind: adamw, learning_rate: 1e9}",
            "learning_rate: expected a number below 1.0, found 1000000000.0 (number)",
        ),
        ("{kind: muon, learning_rate: -1e-3}", "learning_rate: expected a number above 0.0, found -0.001 (number)"),
        ("{kind: muon, learning_rate: .nan}", "learning_rate: expected a finite number, found NaN (number)"),
        ("{kind: adamw, learning_rate: fast}", 'learning_rate: expected a number, found "fast" (text)'),
        ("{kind: adamw, weight_decay: 1e9}", "weight_decay: expected a number of at most 1.0"),
        ("{kind: adamw, eps: 0}", "eps: expected a number above 0.0"),
        ("{kind: muon, momentum: 1}", "momentum: expected a number below 1.0"),
        ("{kind: muon, ns_steps: 0}", "ns_steps: expected a number of at least 1"),
        ("{kind: adamw, momentum: 0.9}", "momentum: unknown key"),
        ("{kind: adam}", 'kind: expected one of adamw, muon, found "adam" (text). Did you mean "adamw"?'),
    ],
)
def test_config_errors(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert f"run.yaml:2: train.optimizer.{says}" in message
    assert "\n" not in message
