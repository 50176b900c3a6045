#!/usr/bin/env bash
# Train the same head on the same data with speculators 0.9.0 and with sstf, in turn, and compare.
#
#   scripts/compare_speculators.sh [--quick] [--threads N] [--folder DIR]
#   scripts/compare_speculators.sh --install-only
#
# This
#   1. makes a virtual environment with speculators (once; about a minute and 1.5 GB, Python 3.11 or later),
#   2. patches three places there that take an accelerator for granted (see compare_speculators.py),
#   3. runs bench_train.py, which extracts the data once, writes it in both forms, trains by turns in
#      processes of their own and prints JSON lines. The options above are handed to it.
# docs/benchmarks.md says what the two trainers do differently.
#
# Environment: SSTF_SPECULATORS_VENV (default .venv-speculators in the repository) says where speculators
# lives, PYTHON which interpreter makes it, TORCH_ARGS is passed to pip for torch (as in the Makefile).
set -euo pipefail

readonly SPECULATORS_VERSION=0.9.0 TRANSFORMERS_VERSION=5.19.0 DATASETS_VERSION=5.1.0

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SSTF_SPECULATORS_VENV:-$repo/.venv-speculators}
torch=$(grep '^torch==' "$repo/constraints.txt")

case ${1:-} in
  -h | --help) sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; exit 0 ;;
esac

# speculators itself without its dependencies: they ask for torchvision and torchaudio, which training does not
# import and which may bring another torch. The rest of its list follows, at the newest versions that it allows.
install_speculators() {
  local stamp=$venv/.sstf-speculators-stamp
  local wanted="speculators==$SPECULATORS_VERSION transformers==$TRANSFORMERS_VERSION datasets==$DATASETS_VERSION $torch"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  echo "compare_speculators: installing $wanted into $venv" >&2
  "${PYTHON:-python3}" -m venv "$venv"
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  local torch_args=()
  read -r -a torch_args <<<"${TORCH_ARGS:-}"
  "${pip[@]}" ${torch_args[@]+"${torch_args[@]}"} "$torch"
  echo "$torch" >"$venv/constraints.txt"
  "${pip[@]}" -c "$venv/constraints.txt" "transformers==$TRANSFORMERS_VERSION" "datasets==$DATASETS_VERSION" \
    aiohttp click httpx huggingface-hub 'loguru<=0.7.3' 'numpy<=2.5.4' openai protobuf psutil pydantic \
    pydantic-settings rich safetensors 'tqdm<=4.70.1' typer
  "${pip[@]}" --no-deps "speculators==$SPECULATORS_VERSION" "hs-connectors==$SPECULATORS_VERSION"
  echo "$wanted" >"$stamp"
}
install_speculators
"$venv/bin/python" "$repo/scripts/compare_speculators.py" patch
if [[ ${1:-} == --install-only ]]; then exit 0; fi

exec "$repo/.venv/bin/python" "$repo/scripts/bench_train.py" --against-speculators "$venv/bin/python" "$@"
