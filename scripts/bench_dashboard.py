"""What `sstf dashboard` costs: seconds until it answers, and its share of a core while it watches.

    python scripts/bench_dashboard.py [--runs 4] [--seconds 60]

It writes the log of `--runs` trainings, one row a second each, has one page listen, and reads the processor time of the
dashboard's process: with none of the logs growing first, then with all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import psutil

FIGURES = [f"{part}/{name}" for part in ("train", "val") for name in ("loss", "overlap", "accuracy")]
ROW = {f"{name}/{i}": 0.5 for name in FIGURES for i in range(5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"run-{i}" / "train" / "k" / "metrics.jsonl" for i in range(args.runs)]
        for log in logs:
            log.parent.mkdir(parents=True)
            log.write_text(json.dumps({"step": 1, **ROW}) + "\n")
        command = [sys.executable, "-m", "sstf", "dashboard", *(str(log.parents[2]) for log in logs), "--port", "0"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2]
            with urlopen(url) as answer:
                answer.read()
            print(f"answers after {time.perf_counter() - start:.2f} s")
            threading.Thread(target=listen, args=(url,), daemon=True).start()
            time.sleep(5)
            watched = psutil.Process(process.pid)
            idle = share(watched, args.seconds, [])
            busy = share(watched, args.seconds, logs)
        finally:
            process.terminate()
            process.wait()
    print(f"no log grows   {idle:.2%} of a core")
    print(f"{args.runs} logs grow    {busy:.2%} of a core: {(busy - idle) / args.runs:.2%} a run")


def listen(url: str) -> None:
    """A page that is open."""
    with urlopen(url + "events?window=900") as stream:
        for _ in stream:
            pass


def share(process: psutil.Process, seconds: float, logs: list[Path]) -> float:
    """Processor time over wall time, while every log gets a row a second."""
    before, start, step = process.cpu_times(), time.perf_counter(), 1
    while time.perf_counter() - start < seconds:
        step += 1
        for log in logs:
            with log.open("a") as file:
                file.write(json.dumps({"step": step, **ROW}) + "\n")
        time.sleep(1)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
