#!/usr/bin/env bash
# Learn eight conversations by heart and serve the head with vLLM: its own count of accepted tokens must be close to
# depth + 1, as our decoder's is. If ours is and vLLM's is not, the export is wrong. Takes about 10 minutes.
#
#   scripts/verify_overfit.sh [--json FILE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/smollm2-135m-instruct/overfit.yaml
.venv/bin/sstf export "$config"
folders=$(.venv/bin/python - "$config" <<'PY'
import sys
from pathlib import Path
from sstf.data.progress import NoProgress
from sstf.pipeline import load_run
run = load_run(Path(sys.argv[1]), [], NoProgress())
print(run.folder("export") / "vllm", run.folder("data") / "conversations.jsonl")
PY
)
read -r head conversations <<<"$folders"
exec scripts/verify_vllm.sh "$head" --prompts "$conversations" --limit 8 --depth 3 --max-tokens 96 --dtype float32 "$@"
