"""Run by `accelerate launch`: what it tells its first process. Argument: the file to write."""

import json
import os
import sys
from pathlib import Path

if os.environ.get("RANK", "0") == "0":
    said = {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))}
    Path(sys.argv[1]).write_text(json.dumps(said), encoding="utf-8")
