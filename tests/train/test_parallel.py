"""Whichever way two processes share the head, they train the head that one process trains, and resume each other."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ARGUMENTS, finish, launcher_environments, start
from parallel_steps import CLIP, Bench
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sstf.errors import ConfigError, DamagedDataError
from sstf.features import FeatureStore
from sstf.train.optim import MuonConfig, build_optimizers
from sstf.train.parallel import open_launch, open_parallel
from sstf.train.parallel.base import LossFirst
from sstf.train.parallel.launch import asked_kind
from sstf.types import StepOutput

KINDS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
ALONE: dict[str, str] = {}
HERE = Path(__file__).parent


@dataclass
class Alone:
    """One process's states after 0, 4 and 8 steps."""

    bench: Bench
    fresh: dict[str, Tensor]
    four: dict[str, Tensor]
    eight: dict[str, Tensor]
    held_out: list[float]


@pytest.fixture(scope="module")
def alone(store: FeatureStore) -> Alone:
    bench = Bench.open(store, ALONE)
    fresh = bench.flat_state()
    bench.steps(0, 4)
    four, held_out = bench.flat_state(), bench.held_out()
    bench.steps(4, 8)
    return Alone(bench, fresh, four, bench.flat_state(), held_out)


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return launcher_environments(tmp_path_factory.mktemp("environments"))


class Results:
    """What the launched processes wrote for the test to compare."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def state(self, name: str, when: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}-{when}.safetensors")


def run(store: FeatureStore, alone: Alone, folder: Path, jobs: list[str], launchers: list[list[str]]) -> Results:
    """Start `launchers` at once, one a machine, and wait for all."""
    save_file(alone.four, folder / "begun.safetensors")
    script = [str(HERE / "parallel_steps.py"), str(store.folder), str(folder / "begun.safetensors"), str(folder)]
    started = [start(*arguments, *script, *jobs) for arguments in launchers]
    for done in [finish(process) for process in started]:
        assert done.returncode == 0, done.stderr[-5000:]
    return Results(folder)


@pytest.fixture(scope="module")
def together(
    store: FeatureStore, alone: Alone, environments: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """Results of all kinds, from two processes that were started once."""
    folder = tmp_path_factory.mktemp("together")
    return run(store, alone, folder, write_jobs(environments, folder), [ARGUMENTS["ddp"]])


def write_jobs(environments: dict[str, dict[str, str]], folder: Path) -> list[str]:
    for kind, environment in environments.items():
        (folder / f"{kind}.environment").write_text(json.dumps(environment), encoding="utf-8")
    return [f"{kind}={folder / kind}.environment" for kind in environments]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- one process -----------------------------------------------------------------------------------------------------


def test_accumulation_is_a_larger_batch(store: FeatureStore, alone: Alone) -> None:
    """6 micro-batches of one conversation, 3 of two, 1 of six: the same head."""
    for parts in (1, 3):
        bench = Bench.open(store, ALONE)
        bench.steps(0, 4, parts)
        close(bench.flat_state(), alone.four)
        torch.testing.assert_close(bench.figures, alone.bench.figures[:4], rtol=0, atol=1e-6)


def test_a_step_by_hand(store: FeatureStore) -> None:
    """Sum of gradients, divided by the count, clipped, then torch's AdamW."""
    bench, twin = (Bench.open(store, ALONE) for _ in range(2))
    bench.step(0)
    valid = 0.0
    for batch in twin.batches(0):
        output = twin.module(batch)
        output.loss.backward()
        valid += float(output.valid[0])
    named = dict(twin.module.head.named_parameters())
    for parameter in named.values():
        assert parameter.grad is not None
        parameter.grad /= valid
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    assert bench.figures[0][-1] == pytest.approx(float(norm), rel=1e-6)
    matrices = [p for p in named.values() if p.ndim == 2]
    rest = [p for p in named.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-5, fused=True).step()
    head, _ = bench.parallel.state()
    close({name: head[name] for name in named}, {name: p.detach() for name, p in named.items()})


def test_one_process_resumes_itself_to_the_bit(store: FeatureStore, alone: Alone) -> None:
    bench = Bench.open(store, ALONE, seed=1)
    bench.load(alone.four)
    bench.steps(4, 8)
    close(bench.flat_state(), alone.eight, atol=0)


def test_a_step_that_is_not_finite_moves_nothing(store: FeatureStore) -> None:
    bench = Bench.open(store, ALONE)
    before = bench.flat_state()
    assert not torch.isfinite(torch.tensor(bench.poisoned()))
    close(bench.flat_state(), before, atol=0)
    bench.forgotten()
    close(bench.flat_state(), before, atol=0)
    bench.step(0)
    alone = Bench.open(store, ALONE)
    alone.step(0)
    close(bench.flat_state(), alone.flat_state(), atol=0)


def test_states_of_another_head_are_refused(store: FeatureStore, alone: Alone) -> None:
    bench = Bench.open(store, ALONE)
    for change, says in (
        ({"head/fc.weight": torch.zeros(3, 3)}, "the checkpoint's head differs from this one in fc.weight"),
        ({"head/other": torch.zeros(3)}, "differs from this one in other"),
        ({"optimizer/exp_avg.fc.weight": torch.zeros(3)}, "has another shape in exp_avg.fc.weight"),
    ):
        with pytest.raises(DamagedDataError, match=says):
            bench.load(alone.four | change)


def test_the_optimiser_sees_the_head_and_nothing_else(store: FeatureStore) -> None:
    launch_ = open_launch(ALONE)
    bench = Bench.open(store, ALONE)
    with pytest.raises(AssertionError, match="each once"):
        open_parallel(launch_, bench.module, lambda named: [torch.optim.AdamW([p for _, p in named[1:]])])
    bench.module.method_weight = nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="method_weight"):
        open_parallel(launch_, bench.module, lambda named: [torch.optim.AdamW([p for _, p in named])])


def test_a_batch_without_anything_to_learn_still_has_gradients() -> None:
    """The other processes wait for them."""

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, batch: Any) -> StepOutput:
            zeros = torch.zeros(1)
            return StepOutput(torch.zeros(()), zeros, zeros, zeros, zeros, zeros.bool()[:, None])

    module = Nothing()
    loss, _ = LossFirst(module)(None)  # type: ignore[arg-type]
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


# ---- two processes ---------------------------------------------------------------------------------------------------


def check_training(results: Results, kind: str, alone: Alone, processes: int = 2, machines: int = 1) -> None:
    figures = results.figures(kind)
    assert figures["facts"] == {
        "kind": kind, "processes": processes, "machines": machines, "backend": "gloo", "device": "cpu"
    }  # fmt: skip
    close(results.state(kind, "fresh"), alone.fresh, atol=0)
    # Loss of each test-time-training step and gradient norm, at each of eight steps; the last four are a resumed run's.
    torch.testing.assert_close(figures["figures"], alone.bench.figures, rtol=0, atol=1e-6)
    torch.testing.assert_close(figures["held_out"], alone.held_out, rtol=0, atol=1e-6)
    close(results.state(kind, "four"), alone.four)
    finite, unmoved = figures["poisoned"]
    assert not finite and unmoved


def check_resuming(results: Results, kind: str, alone: Alone, store: FeatureStore) -> None:
    """1 process -> several, and several -> 1."""
    close(results.state(kind, "loaded"), alone.four, atol=0)
    close(results.state(kind, "eight"), alone.eight)
    bench = Bench.open(store, ALONE, seed=2)
    bench.load(results.state(kind, "four"))
    bench.steps(4, 8)
    close(bench.flat_state(), alone.eight)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, alone: Alone, together: Results) -> None:
    check_training(together, kind, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_where_one_stopped_and_back(
    kind: str, store: FeatureStore, alone: Alone, together: Results
) -> None:
    check_resuming(together, kind, alone, store)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_with_nothing_to_learn_from_takes_part(
    kind: str, store: FeatureStore, alone: Alone, together: Results
) -> None:
    bench = Bench.open(store, ALONE)
    bench.load(alone.four)
    mine = bench.batches(4)[::2]
    outputs = [bench.parallel.backward(batch, batch is mine[-1]) for batch in mine]
    bench.parallel.step(1 / float(sum(output.valid[0] for output in outputs)), CLIP)
    lopsided = bench.flat_state()
    assert not torch.equal(lopsided["head/fc.weight"], alone.four["head/fc.weight"])
    close(together.state(kind, "lopsided"), lopsided)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_on_two_processes(kind: str, store: FeatureStore, together: Results) -> None:
    """The engines leave the precision alone. (ZeRO-3's gradients of a weight used thrice are added up in float32,
    where the others' are in bfloat16: autocast keeps one rounded copy of a weight that is not a piece of a buffer.)"""
    bench = Bench.open(store, ALONE, precision="bf16")
    bench.steps(0, 2)
    assert abs(bench.figures[0][0] - together.figures(kind)["figures"][0][0]) > 1e-6
    torch.testing.assert_close(together.figures(kind)["bf16"], bench.figures, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_ready_configuration_by_its_own_launcher(
    kind: str, store: FeatureStore, alone: Alone, tmp_path: Path
) -> None:
    results = run(store, alone, tmp_path, [f"{kind}="], [ARGUMENTS[kind]])
    check_training(results, kind, alone)
    check_resuming(results, kind, alone, store)


@pytest.mark.slow
def test_three_processes(
    store: FeatureStore, alone: Alone, environments: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """No parameter divides by three: pieces are uneven, or filled up."""
    jobs = write_jobs(environments, tmp_path)
    results = run(store, alone, tmp_path, jobs, [[*ARGUMENTS["ddp"], "--num_processes", "3"]])
    for kind in KINDS:
        check_training(results, kind, alone, processes=3)
        check_resuming(results, kind, alone, store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_two_machines(kind: str, store: FeatureStore, alone: Alone, tmp_path: Path) -> None:
    """The launch lines of docs/multi-gpu.md for two machines, both of them this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    machines = [[*ARGUMENTS[kind], *shared, "--main_process_port", port, "--machine_rank", rank] for rank in "01"]
    results = run(store, alone, tmp_path, [f"{kind}="], machines)
    check_training(results, kind, alone, machines=2)
    check_resuming(results, kind, alone, store)


# ---- what was asked for ----------------------------------------------------------------------------------------------


def test_the_ready_configurations_ask_for_their_kinds(environments: dict[str, dict[str, str]]) -> None:
    assert {kind: asked_kind(environment)[0] for kind, environment in environments.items()} == {k: k for k in KINDS}
    assert all(environment["WORLD_SIZE"] == "2" for environment in environments.values())


def test_what_is_asked_for_but_not_built_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    cases: list[tuple[dict[str, str], str, str]] = [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "", "set fsdp_version: 2"),
        (fsdp | {"FSDP_OFFLOAD_PARAMS": "true"}, "", "sets fsdp_offload_params"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "", "without a deepspeed_config_file"),
        (zero, "{", "cannot be read"),
        (zero, "{}", "stage is None; expected 1, 2 or 3"),
        (zero, '{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "sets fp16, which the run's"),
        (zero, '{"zero_optimization": {"stage": 3, "offload_param": {}}}', "sets offload_param"),
        # The launcher fell back to a single process.
        (fsdp, "", "asked for fsdp2 but started this process alone"),
    ]
    for environment, text, says in cases:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=says):
            open_launch(environment)


def test_muon_is_refused_by_zero(store: FeatureStore) -> None:
    pytest.importorskip("deepspeed")
    from sstf.train.parallel.zero import check_adamw

    head = Bench.open(store, ALONE).module.head
    with pytest.raises(ConfigError, match="gives the optimiser pieces of matrices"):
        check_adamw("zero2", build_optimizers(MuonConfig(), head.named_parameters()))
