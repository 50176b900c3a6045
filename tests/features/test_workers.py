"""Any number of threads, processes and parts gives the same store, and none of them takes the work of the others down.

The processes are real, and so is the signal that kills one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_samples import CONFIG, SPEC, contents, extract_to, random_samples
from pydantic import ValidationError
from tiny_models import tiny_llama

from sstf.child_process import ChildProcess
from sstf.data.progress import NoProgress, Task
from sstf.errors import ConfigError, DamagedDataError, SstfError, TargetError, WorkerError
from sstf.features import ExtractConfig, Part, extract, own_target, shards, verify, workers
from sstf.targets import Target, TargetConfig, load_configured, load_target
from sstf.types import TokenSample


@pytest.fixture(scope="module")
def samples() -> list[TokenSample]:
    return random_samples()


@pytest.fixture(scope="module")
def alone(
    tiny_target: Target, samples: list[TokenSample], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The store of one process with one thread."""
    return contents(extract_to(tmp_path_factory.mktemp("alone"), tiny_target, samples))


@pytest.fixture(scope="module")
def source(tiny_target_folder: Path) -> TargetConfig:
    return TargetConfig(name=str(tiny_target_folder), dtype="float32", device="cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Counting:
    """Progress that counts, and calls back."""

    def __init__(self, on_advance: Callable[[int], None] = lambda done: None) -> None:
        self.total: int | None = None
        self.done, self._on_advance = 0, on_advance

    def start(self, label: str, total: int | None, unit: str) -> Task:
        self.total = total
        return self

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._on_advance(self.done)


def extract_with(
    workers_: int, folder: Path, source: TargetConfig, samples: list[TokenSample], progress: Any = None, **others: Any
) -> bool:
    config = CONFIG.model_copy(update={"workers": workers_, **others})
    target = load_configured(own_target(config, source))
    return extract(target, samples, SPEC, config, folder, progress or NoProgress(), source)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_make_the_same_store(
    threads: int, tiny_target: Target, samples: list[TokenSample], alone: dict[str, bytes], tmp_path: Path
) -> None:
    progress = Counting()
    with torch_threads(threads):
        extract(tiny_target, samples, SPEC, CONFIG, tmp_path, progress)
        assert torch.get_num_threads() == threads
    assert contents(tmp_path) == alone
    assert progress.done == progress.total == sum(len(sample.input_ids) for sample in samples)


def test_a_shard_is_computed_by_one_thread(
    tiny_target: Target, samples: list[TokenSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would divide a matrix product, and the last bits with it: at these sizes that would not be seen."""
    read, seen = shards.read_features, set[tuple[int, int]]()

    def watched(*arguments: Any) -> Any:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return read(*arguments)

    monkeypatch.setattr(shards, "read_features", watched)
    with torch_threads(3):
        extract_to(tmp_path, tiny_target, samples)
    assert {count for _, count in seen} == {1}
    assert len({thread for thread, _ in seen}) > 1


@pytest.mark.parametrize(
    "workers_", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_processes_make_the_same_store(
    workers_: int, source: TargetConfig, samples: list[TokenSample], alone: dict[str, bytes], tmp_path: Path
) -> None:
    progress = Counting()
    assert extract_with(workers_, tmp_path, source, samples, progress)
    assert contents(tmp_path) == alone
    assert progress.done == progress.total
    assert verify(tmp_path, NoProgress()).faults == ()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert extract_with(workers_, tmp_path, source, samples)  # nothing is left to do, and no process starts
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}


def test_a_target_from_the_disk_makes_the_same_store(
    source: TargetConfig, samples: list[TokenSample], alone: dict[str, bytes], tmp_path: Path
) -> None:
    target = load_configured(source.model_copy(update={"device_map": "disk", "device": "auto"}))
    with torch_threads(2):  # one is taken: a pass brings weights into memory and out again
        extract_to(tmp_path, target, samples)
    assert contents(tmp_path) == alone


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_parts_make_the_same_store_in_any_order(
    tiny_target: Target, samples: list[TokenSample], alone: dict[str, bytes], tmp_path: Path
) -> None:
    done = [
        extract(tiny_target, samples, SPEC, CONFIG, tmp_path, NoProgress(), part=Part.parse(part))
        for part in ("3/3", "1/3", "3/3", "2/3")
    ]
    assert done == [False, False, False, True]
    assert contents(tmp_path) == alone


PART = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from feature_samples import CONFIG, SPEC, random_samples
from sstf.data.progress import NoProgress
from sstf.features import Part, extract
from sstf.targets import load_target
target = load_target({target!r}, "float32", "cpu")
print("ready", flush=True)
sys.stdin.readline()
print(extract(target, random_samples(), SPEC, CONFIG, Path({folder!r}), NoProgress(), part=Part.parse({part!r})))
"""


@pytest.mark.slow
def test_parts_at_once_in_one_folder(tiny_target_folder: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    """Two of them are the same part: both write, and neither spoils what the other wrote."""
    paths = [str(Path(__file__).parent)]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PART.format(paths=paths, target=str(tiny_target_folder), folder=str(tmp_path), part=part),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in ("1/2", "2/2", "2/2")
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:  # all at once
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "True" in answers
    assert contents(tmp_path) == alone


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3"])
def test_parts_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"the part is '{re.escape(text)}'; expected I/N with I from 1 to N"):
        Part.parse(text)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_named_and_nothing_is_lost(
    source: TargetConfig,
    samples: list[TokenSample],
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[ChildProcess] = []

    class Watched(ChildProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)
            if len(started) == 2:  # held, or on a quick machine it ends before the signal
                os.kill(self.pid, signal.SIGSTOP)

    monkeypatch.setattr(workers, "ChildProcess", Watched)

    def kill(done: int) -> None:
        if done and list(tmp_path.glob("shard-*.json")):
            os.kill(started[1].pid, signal.SIGKILL)

    with pytest.raises(
        WorkerError,
        match=r"extraction worker 2 of 2 was killed \(signal 9, as the system does when memory runs out\); finished "
        r"shards are kept: run the command again, with fewer extract.workers",
    ) as caught:
        extract_with(2, tmp_path, source, samples, Counting(kill))
    assert caught.value.exit_code == 2
    for child in started:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)
        assert not child.log.exists()
    assert not (tmp_path / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.json")}
    assert finished
    target = load_configured(source)
    assert extract(target, samples, SPEC, CONFIG, tmp_path, NoProgress())  # and by another number of workers
    assert contents(tmp_path) == alone
    assert finished == {name: (tmp_path / name).stat().st_mtime_ns for name in finished}


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(
    source: TargetConfig, samples: list[TokenSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ChildProcess] = []

    class Watched(ChildProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    def interrupt(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(workers, "ChildProcess", Watched)
    with pytest.raises(KeyboardInterrupt):
        extract_with(2, tmp_path, source, samples, Counting(interrupt))
    assert len(started) == 2
    for child in started:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_or_an_error_ends_the_threads(
    threads: int,
    tiny_target: Target,
    samples: list[TokenSample],
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = threading.active_count()
    for what in (KeyboardInterrupt, OSError(28, "No space left on device")):

        def fail(done: int, what: Any = what) -> None:
            raise what

        with torch_threads(threads), pytest.raises(type(what) if isinstance(what, OSError) else what):
            extract(tiny_target, samples, SPEC, CONFIG, tmp_path, Counting(fail))
        assert threading.active_count() == before
        assert torch.get_num_threads() == 1
    assert not (tmp_path / "manifest.json").exists()
    extract_to(tmp_path, tiny_target, samples)
    assert contents(tmp_path) == alone


@pytest.mark.slow
def test_what_a_worker_finds_wrong_is_said_here(
    source: TargetConfig, tiny_target_folder: Path, samples: list[TokenSample], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "tiny"
    shutil.copytree(tiny_target_folder, other)
    config = CONFIG.model_copy(update={"workers": 2})
    target = load_configured(own_target(config, source))
    tiny_llama(seed=21).save_pretrained(other)  # the weights change between our loading and the workers'
    with pytest.raises(TargetError, match=r"a worker loaded target tiny \([0-9a-f]+\), the store is made from tiny"):
        extract(
            target, samples, SPEC, config, tmp_path / "a", NoProgress(), source.model_copy(update={"name": str(other)})
        )
    spoiled = tiny_llama()
    spoiled.model.layers[3].mlp.up_proj.weight.data[5] = float("nan")
    spoiled.save_pretrained(other)
    source = source.model_copy(update={"name": str(other)})
    with pytest.raises(SstfError, match=r"not finite|differs from the model's own logits"):
        extract_with(2, tmp_path / "b", source, samples)


@pytest.mark.slow
def test_a_full_disk_in_a_worker(
    source: TargetConfig, samples: list[TokenSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers write to a disk that is full from the first byte on."""
    config = CONFIG.model_copy(update={"workers": 2})
    target = load_configured(own_target(config, source))
    code = (
        "import errno, sys\n"
        "from sstf.features import store\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "store.write_bytes_atomic = full\n"
        "from sstf.features.worker import main\n"
        "main()\n"
    )

    class Full(ChildProcess):
        def __init__(self, command: list[str], *rest: Any) -> None:
            super().__init__([command[0], "-c", code], *rest)

    monkeypatch.setattr(workers, "ChildProcess", Full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        extract(target, samples, SPEC, config, tmp_path, NoProgress(), source)
    assert caught.value.errno == 28


def test_settings_that_contradict_each_other(
    source: TargetConfig, tiny_target: Target, samples: list[TokenSample], tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=r"extract.workers is 2 with extract.engine.kind vllm"):
        ExtractConfig.model_validate({"workers": 2, "engine": {"kind": "vllm", "python": Path("python")}})
    spread = source.model_copy(update={"device": "auto", "device_map": "auto"})
    config = CONFIG.model_copy(update={"workers": 2})
    with pytest.raises(ConfigError, match=r"extract.workers is 2 with target.device_map: one model over all devices"):
        extract(tiny_target, samples, SPEC, config, tmp_path, NoProgress(), spread)


def test_the_identity_of_a_store_is_not_who_made_it() -> None:
    plain = ExtractConfig()
    assert plain.identity() == ExtractConfig(workers=7).identity()
    ray = ExtractConfig.model_validate({"workers": 7, "engine": {"kind": "ray"}})
    assert plain.identity() == ray.identity()
    vllm = ExtractConfig.model_validate({"engine": {"kind": "vllm", "python": Path("a")}})
    assert plain.identity() != vllm.identity()
    assert vllm.identity() == ExtractConfig.model_validate({"engine": {"kind": "vllm", "python": Path("b")}}).identity()
    assert plain.identity() != ExtractConfig(codec="int8").identity()


def test_shards_of_another_engine_are_refused(
    tiny_target: Target, samples: list[TokenSample], alone: dict[str, bytes], tmp_path: Path, source: TargetConfig
) -> None:
    for name, data in alone.items():
        (tmp_path / name).write_bytes(data)
    config = ExtractConfig.model_validate(
        CONFIG.model_dump() | {"engine": {"kind": "vllm", "python": Path(sys.executable)}}
    )
    with pytest.raises(DamagedDataError, match="was made with engine transformers, this run has vllm"):
        extract(tiny_target, samples, SPEC, config, tmp_path, NoProgress(), source)
    assert load_target(source.name, "float32", "cpu").spec == tiny_target.spec


# ---- vLLM and Ray that are not there ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("/no/such/python", r"extract.engine.python is /no/such/python, which cannot be started \(No such file"),
        (sys.executable, r"vLLM ended with code 1 \(ModuleNotFoundError: No module named 'vllm'\); what it had"),
    ],
)
def test_vllm_that_is_not_there(
    python: str, why: str, source: TargetConfig, samples: list[TokenSample], tmp_path: Path
) -> None:
    config = ExtractConfig.model_validate(CONFIG.model_dump() | {"engine": {"kind": "vllm", "python": Path(python)}})
    target = load_configured(own_target(config, source))
    with pytest.raises(SstfError, match=why) as caught:
        extract(target, samples, SPEC, config, tmp_path, NoProgress(), source)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_ray_that_is_not_there(
    source: TargetConfig, samples: list[TokenSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = ExtractConfig.model_validate(CONFIG.model_dump() | {"engine": {"kind": "ray"}})
    target = load_configured(own_target(config, source))
    with pytest.raises(ConfigError, match=r'which is not installed; run `pip install "sstf\[ray\]"`, on every machine'):
        extract(target, samples, SPEC, config, tmp_path, NoProgress(), source)
