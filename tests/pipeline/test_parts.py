"""`sstf extract --part I/N`: parts on one folder, a whole run beside them, and the stage that they finish together."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import yaml
from pipeline_runs import base_config, open_run, write_conversations, write_suite

from sstf.cli import main
from sstf.errors import ConfigError
from sstf.features import Part
from sstf.pipeline import Run


@pytest.fixture
def config(tiny_target_folder: Path, tmp_path: Path) -> Path:
    write_conversations(tmp_path / "conversations.jsonl", 24)
    write_suite(tmp_path / "suite.jsonl")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(base_config(tiny_target_folder, tmp_path)), encoding="utf-8")
    return path


def store(run: Run) -> dict[str, bytes]:
    folder = run.folder("extract")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.yaml"}


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, " ".join((out + err).split())


def test_parts_finish_the_stage_together(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = command(capsys, "extract", str(config), "--part", "1/2")
    assert (code, "the token ids of this configuration are missing; run `sstf data`" in said) == (2, True)
    open_run(config).up_to("data")
    code, said = command(capsys, "extract", str(config), "--part", "2/2")
    assert (code, "part 2/2 is done; shards of other parts are missing" in said) == (0, True)
    run = open_run(config)
    assert run.summary("extract") is None
    (run.folder("extract") / ".shard-00000.safetensors.ab.77.tmp").write_bytes(b"of a part that was killed")
    code, said = command(capsys, "extract", str(config), "--part", "1/2")
    assert (code, "features" in said) == (0, True)
    assert run.summary("extract") is not None
    whole = open_run(config, f"output_dir={tmp_path / 'whole'}")
    whole.up_to("extract")
    assert store(run) == store(whole)
    code, said = command(capsys, "extract", str(config), "--part", "3/2")
    assert (code, "the part is '3/2'; expected I/N" in said) == (2, True)


def test_a_whole_run_keeps_parts_out_and_parts_keep_it_out(config: Path) -> None:
    run = open_run(config)
    run.up_to("data")
    lock = run.config.folder / ".lock"
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is working in"):
            run.extract_part(Part.parse("1/2"))
        fcntl.flock(file, fcntl.LOCK_SH)  # another part
        leftover = run.folder("extract") / ".shard-00009.json.ab.77.tmp"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(b"what the other part is writing")
        with pytest.raises(ConfigError, match="another process is working in"):
            run.up_to("extract")
        assert run.extract_part(Part.parse("1/2")) is False
        assert run.extract_part(Part.parse("2/2")) is True
        assert leftover.exists()


def test_keys_do_not_know_who_extracts(config: Path) -> None:
    plain = open_run(config).keys
    assert open_run(config, "extract.workers=3").keys == plain
    assert open_run(config, "extract.engine={kind: ray}", "extract.workers=3").keys == plain
    assert open_run(config, "target.device=auto", "target.device_map=disk").keys == plain
    vllm = open_run(config, "extract.engine={kind: vllm, python: /x/python}").keys
    assert vllm["data"] == plain["data"]
    assert vllm["extract"] != plain["extract"]


@pytest.mark.slow
def test_workers_and_the_disk_in_a_run(config: Path, tmp_path: Path) -> None:
    run = open_run(config)
    run.up_to("extract")
    for i, override in enumerate(("extract.workers=2", "target.device_map=disk")):
        other = open_run(config, f"output_dir={tmp_path / str(i)}", "target.device=auto", override)
        other.up_to("extract")
        assert store(other) == store(run)
