"""`accelerate launch` as a user starts it, from the top of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
CPU_2 = CONFIGS / "cpu-2.yaml"
ZERO = {kind: ROOT / "configs" / "deepspeed" / f"{kind}.json" for kind in ("zero1", "zero2", "zero3")}
# The launcher's arguments for each kind on two processes on CPUs.
ARGUMENTS = {"ddp": ["--config_file", str(CPU_2)], "fsdp2": ["--config_file", str(CONFIGS / "cpu-2-fsdp2.yaml")]} | {
    kind: ["--config_file", str(CONFIGS / "cpu-2-zero.yaml"), "--deepspeed_config_file", str(file)]
    for kind, file in ZERO.items()
}


def start(*arguments: str) -> subprocess.Popen[str]:
    return start_python("-m", "accelerate.commands.launch", *arguments)


def start_python(*arguments: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launcher_environments(folder: Path) -> dict[str, dict[str, str]]:
    """What the launcher really says to its processes, given the ready configuration of each kind."""
    files = {kind: folder / f"{kind}.said" for kind in ("ddp", "fsdp2", "zero2")}
    asked = folder / "asked.json"
    asked.write_text(json.dumps({str(file): ARGUMENTS[kind] for kind, file in files.items()}), encoding="utf-8")
    done = finish(start_python(str(Path(__file__).with_name("launcher_environment.py")), str(asked)))
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, dict[str, str]] = {k: json.loads(file.read_text(encoding="utf-8")) for k, file in files.items()}
    for kind in ("zero1", "zero3"):  # the slow tier launches them too
        out[kind] = out["zero2"] | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO[kind])}
    return out


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return finish(start(*arguments))
