"""The average of the weights: by hand, put in and taken out to the bit, through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors
from torch import Tensor, nn

from sstf.config_loading import Section, load
from sstf.errors import ConfigError, DamagedDataError
from sstf.train.config import TrainConfig
from sstf.train.ema import Ema


class Head(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(5, 3, bias=False)
        self.norm = nn.RMSNorm(3)
        self.register_buffer("d2t", torch.arange(3))


def move(head: nn.Module, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn(parameter.shape, generator=random)


def copies(head: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}


def test_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    ema = Ema(0.25, [("weight", weight)])
    seen = []
    for step, value in enumerate((11.0, 2.0, 4.0, 8.0)):
        weight.data.fill_(value)
        ema.update(step)
        seen.append(float(ema.state()["weight"]))
    # The decay warms up as 1/10, 2/11, 3/12 = 0.25, and stays there.
    first = 0.1 * 1 + 0.9 * 11
    second = 2 / 11 * first + 9 / 11 * 2
    third = 0.25 * second + 0.75 * 4
    assert seen == pytest.approx([first, second, third, 0.25 * third + 0.75 * 8], rel=1e-6)


def test_is_the_plain_loop() -> None:
    head = Head()
    ema = Ema(0.9, head.named_parameters())
    plain = {name: tensor.double() for name, tensor in copies(head).items()}
    for step in range(200):
        move(head, step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        plain = {name: decay * plain[name] + (1 - decay) * tensor.double() for name, tensor in copies(head).items()}
    for name, average in ema.state().items():
        assert average.dtype == torch.float32 and not average.requires_grad
        torch.testing.assert_close(average.double(), plain[name], rtol=1e-5, atol=1e-5)


def test_swapped_puts_the_trained_weights_back_to_the_bit() -> None:
    head = Head()
    ema = Ema(0.9, head.named_parameters())
    move(head, 0)
    ema.update(0)
    trained, averages = copies(head), {name: tensor.clone() for name, tensor in ema.state().items()}
    objects = list(head.parameters())
    with ema.swapped():
        assert all(torch.equal(parameter, averages[name]) for name, parameter in head.named_parameters())
        assert all(torch.equal(average, averages[name]) for name, average in ema.state().items())
        with torch.no_grad():
            head.fc.weight.zero_()  # whatever happens inside
    assert all(torch.equal(parameter, trained[name]) for name, parameter in head.named_parameters())
    assert all(torch.equal(average, averages[name]) for name, average in ema.state().items())
    assert all(one is two for one, two in zip(objects, head.parameters(), strict=True))


def test_swapped_puts_back_after_an_exception() -> None:
    head = Head()
    ema = Ema(0.9, head.named_parameters())
    move(head, 0)
    trained = copies(head)
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, trained[name]) for name, parameter in head.named_parameters())


def test_averaging_does_not_change_training() -> None:
    """Weights, gradients and the optimiser's state go on as without the average, swapping or not."""

    def trained(averaged: bool) -> dict[str, Tensor]:
        head = Head()
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
        ema = Ema(0.9, head.named_parameters())
        for step in range(5):
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            head.norm(head.fc(inputs)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if averaged:
                ema.update(step)
                with ema.swapped():
                    pass
        return copies(head)

    plain, averaged = trained(False), trained(True)
    assert all(torch.equal(plain[name], averaged[name]) for name in plain)


def test_goes_on_as_if_unbroken() -> None:
    head = Head()
    ema = Ema(0.9, head.named_parameters())
    for step in range(3):
        move(head, step)
        ema.update(step)
    weights, saved = write_safetensors(copies(head)), write_safetensors(ema.state())
    for step in range(3, 6):
        move(head, step)
        ema.update(step)

    other = Head(seed=1)
    other.load_state_dict(read_safetensors(weights), strict=False)
    resumed = Ema(0.9, other.named_parameters())
    state = read_safetensors(saved)
    resumed.load(state)
    for step in range(3, 6):
        move(other, step)
        resumed.update(step)
    assert all(torch.equal(average, resumed.state()[name]) for name, average in ema.state().items())
    assert all(torch.equal(state[name], tensor) for name, tensor in read_safetensors(saved).items())  # a copy was taken


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "do not fit this head in fc.weight, norm.weight; go on from an earlier"),
        ({"fc.weight": torch.zeros(3, 5), "norm.weight": torch.zeros(4)}, "do not fit this head in norm.weight;"),
        (
            {"fc.weight": torch.zeros(3, 5), "norm.weight": torch.zeros(3), "more": torch.zeros(1)},
            "do not fit this head in more;",
        ),
    ],
)
def test_damaged_state(state: dict[str, Tensor], says: str) -> None:
    ema = Ema(0.9, Head().named_parameters())
    before = {name: tensor.clone() for name, tensor in ema.state().items()}
    with pytest.raises(DamagedDataError, match=says):
        ema.load(state)
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.state().items())


class Root(Section):
    train: TrainConfig


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "train.ema: expected a number above 0.0, found 0 (integer)"),
        ("1", "train.ema: expected a number below 1.0, found 1 (integer)"),
        ("true", "train.ema: expected a number, found true (true/false)"),
    ],
)
def test_config_errors(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{steps: 5, ema: {text}}}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(Root, path)
    assert says in str(caught.value)


def test_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 5, ema: 0.999}", encoding="utf-8")
    assert load(Root, path).train.ema == 0.999
