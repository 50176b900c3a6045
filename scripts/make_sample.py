"""Make the sample conversations that ship with the package, with their provenance beside them (about 25 minutes).

python scripts/make_sample.py [configs/smollm2-135m-instruct/sample.yaml]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from sstf.data.conversations import SAMPLE
from sstf.evaluation import hardware
from sstf.pipeline import Run, load_run
from sstf.progress_display import display


def package(run: Run, folder: Path) -> None:
    """Compress the conversations of a finished data stage and write down where they come from."""
    text = (folder / "conversations.jsonl").read_bytes()
    SAMPLE.parent.mkdir(exist_ok=True)
    SAMPLE.write_bytes(gzip.compress(text, 9, mtime=0))
    provenance = {
        "what": "Conversations whose requests and answers were both sampled from the target; no other data went in.",
        "command": "python scripts/make_sample.py",
        "target": run.target.spec.to_json(),
        "licence": "Apache-2.0, as the target's weights",
        "data": run.config.data.model_dump(mode="json"),
        "report": json.loads((folder / "report.json").read_text()),
        "sha256_uncompressed": hashlib.sha256(text).hexdigest(),
        "sstf": version("sstf"),
        "hardware": hardware(),
    }
    (SAMPLE.parent / "smollm2-135m-instruct.provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/smollm2-135m-instruct/sample.yaml"))
    run = load_run(parser.parse_args().config, [], display(Console(stderr=True)))
    run.up_to("data")
    package(run, run.folder("data"))


if __name__ == "__main__":
    main()
