"""`accelerate launch` as a user starts it, from the top of the checkout."""

from __future__ import annotations

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
    paths = [str(ROOT), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
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


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return finish(start(*arguments))
