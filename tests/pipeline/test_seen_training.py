"""`sstf train` behind a terminal of sixty columns: the live view, as a person starts it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

from pipeline_runs import WriteConfig, open_run


def test_a_training_shows_what_it_logs(write_config: WriteConfig) -> None:
    config = write_config()
    open_run(config).up_to("extract")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-m", "sstf", "train", str(config), "train.parity=false"],
        env=environment | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    data = b""
    while True:
        try:
            data += os.read(ours, 65536)
        except OSError:  # the child ended
            break
    os.close(ours)
    assert child.wait(60) == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode().split("\x1b[2K")[-1])
    lines = (open_run(config, "train.parity=false").folder("train") / "metrics.jsonl").read_text().splitlines()
    last = {name: value for line in lines for name, value in json.loads(line).items()}
    assert "training 4/4" in screen
    for row, figure in (("loss", "train/loss"), ("overlap", "train/overlap"), ("val accuracy", "val/accuracy")):
        assert re.search(rf"^{row} +{last[f'{figure}/0']:.3f} +{last[f'{figure}/1']:.3f}\s*$", screen, re.MULTILINE), (
            row
        )
    assert f"simulated accepted length {last['val/simulated_accepted_length']:.3f} (step 4)" in screen
