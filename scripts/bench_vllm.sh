#!/usr/bin/env bash
# Serve a target with vLLM twice, plain and with an exported head, and run `sstf bench` on the two.
#
#   scripts/bench_vllm.sh HEAD_DIR [--target DIR] [--dtype D] [--depth K] -- [options of sstf bench]
#
# for example
#
#   scripts/bench_vllm.sh runs/demo/export/<key>/vllm --depth 2 -- --concurrency 1,2 --requests 16 --max-tokens 48
#
# Both servers listen on loopback, fetch nothing and end with this script, whose exit code is that of `sstf bench`.
# They take turns, so that neither slows the other; still, each holds its own copy of the model.
#
# Options
#   --target DIR         target model folder (default: sstf.targets.locate('smollm2-135m-instruct'))
#   --dtype D            of target and head in vLLM (default bfloat16; float32 keeps greedy answers identical)
#   --depth K            draft tokens per verify pass (default 3)
#   --start-timeout S    seconds a server may take to answer its first request (default 300)
#
# Environment: SSTF_VLLM_VENV says where vLLM lives, as for verify_vllm.sh, which makes it if need be.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SSTF_VLLM_VENV:-$repo/.venv-vllm}
sstf=$repo/.venv/bin/sstf measure_py=$repo/scripts/verify_vllm.py

fail() { echo "bench_vllm: $*" >&2; exit 2; }
usage() { sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; }

head_dir='' target='' dtype=bfloat16 depth=3 start_timeout=300
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --target | --dtype | --depth | --start-timeout) (($# >= 2)) || fail "$1 wants a value." ;;&
    --target) target=$2; shift 2 ;;
    --dtype) dtype=$2; shift 2 ;;
    --depth) depth=$2; shift 2 ;;
    --start-timeout) start_timeout=$2; shift 2 ;;
    -*) fail "unknown option $1; options of sstf bench come after -- (see --help)." ;;
    *) [[ -z $head_dir ]] || fail "one HEAD_DIR is expected, found '$head_dir' and '$1'."
       head_dir=$1; shift ;;
  esac
done
for pair in "--depth $depth" "--start-timeout $start_timeout"; do
  [[ ${pair#* } =~ ^[1-9][0-9]*$ ]] || fail "${pair% *} wants a whole number from 1 up, found '${pair#* }'."
done
[[ -n $head_dir ]] || fail "HEAD_DIR is missing: the folder that the vLLM exporter wrote (see --help)."
[[ -f $head_dir/config.json ]] || fail "$head_dir holds no config.json; is it an exported head?"
[[ -x $venv/bin/python ]] || "$repo/scripts/verify_vllm.sh" --install-only
if [[ -z $target ]]; then
  target=$("$repo/.venv/bin/python" -c "from sstf import targets; print(targets.locate('smollm2-135m-instruct'))") ||
    fail "could not find the default target; name its folder with --target."
fi
[[ -f $target/config.json ]] || fail "$target holds no config.json; --target wants a model folder."
head_dir=$(cd "$head_dir" && pwd) target=$(cd "$target" && pwd)

work=$(mktemp -d) servers=()
# A server leads a process group of its own, with the workers that it starts.
cleanup() {
  for pid in ${servers[@]+"${servers[@]}"}; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  for _ in {1..60}; do
    alive=false
    for pid in ${servers[@]+"${servers[@]}"}; do kill -0 -- "-$pid" 2>/dev/null && alive=true; done
    $alive || break
    sleep 0.25
  done
  for pid in ${servers[@]+"${servers[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Arguments: a name, then extra server options. Sets `url`.
serve() {
  local name=$1; shift
  local log=$work/$name.log port pid
  port=$("$venv/bin/python" "$measure_py" free-port)
  url=http://127.0.0.1:$port
  echo "bench_vllm: starting the $name server on port $port" >&2
  # The target's generation config (penalties, temperatures) is left out, so that greedy means greedy. Prefix caching
  # is off: a prompt that comes twice is computed twice.
  VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} \
    VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
    setsid "$venv/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$target" --served-model-name target --host 127.0.0.1 --port "$port" --dtype "$dtype" --enforce-eager \
    --generation-config vllm --no-enable-prefix-caching --max-model-len 2048 --max-num-seqs 8 "$@" \
    >"$log" 2>&1 </dev/null &
  pid=$!
  servers+=("$pid")
  local deadline=$((SECONDS + start_timeout))
  until "$venv/bin/python" "$measure_py" healthy --url "$url"; do
    if ! kill -0 "$pid" 2>/dev/null || ((SECONDS >= deadline)); then
      tail -n 40 "$log" >&2
      fail "the $name server did not start within $start_timeout s; above is the end of its log."
    fi
    sleep 1
  done
}

serve plain
baseline=$url
serve speculative --speculative-config \
  "$("$venv/bin/python" "$measure_py" speculative-config --head "$head_dir" --depth "$depth")"
"$sstf" bench --baseline "$baseline" --candidate "$url" "$@"
