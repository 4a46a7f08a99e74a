#!/usr/bin/env bash
# Shows the whole path on this machine: installs what is missing, builds, starts
# the planner, and trains two jobs under it, step after step, with a stand-in
# trainer (one process a rank, real messages, sleeps in place of kernels).
#
#   deploy/demo.sh [--steps N] [--microbatches N] [--out DIR]
#
# Leaves a trace and a picture of a planned step in DIR (default: demo-out), no
# process (but a Bazel server that was there before), and exits 0 when every step
# of both jobs ran.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=8
microbatches=16
out=$root/demo-out
while (($#)); do
  case $1 in
    --steps) steps=${2:?--steps: missing its number} ;;
    --microbatches) microbatches=${2:?--microbatches: missing its number} ;;
    --out) out=${2:?--out: missing its folder} ;;
    *)
      sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done
[[ $steps =~ ^[1-9][0-9]{0,3}$ ]] || { echo "--steps: $steps: must be 1 to 9999" >&2; exit 2; }
[[ $microbatches =~ ^[1-9][0-9]{0,3}$ ]] || { echo "--microbatches: $microbatches: must be 1 to 9999" >&2; exit 2; }

# shellcheck source=deploy/packages.sh
source "$root/deploy/packages.sh"
install_packages "${BUILD_PACKAGES[@]}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
# Names of files in it are listed with commas between them.
[[ $out != *,* ]] || { echo "--out: $out: must not have a comma in it" >&2; exit 2; }
cd "$root"
echo "building (about 3 minutes on two cores the first time, with nothing to see)"
# The name of this clone's Bazel server; the brackets keep grep from finding itself.
had_bazel=$(grep -lzx "ba[z]el($(basename "$root"))" /proc/[0-9]*/cmdline 2>/dev/null || true)
bazel build --noshow_progress --ui_event_filters=-info //server:pipeweaver_server \
  //server/ctl:pipeweaverctl //client_agents/standin:pipeweaver_trainer
ctl=bazel-bin/server/ctl/pipeweaverctl
jobs=(vlm-s t2v-s)

pids=()
stop_all() {
  local pid
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  [[ -n $had_bazel ]] || bazel shutdown
}
trap stop_all EXIT

# What an earlier run left there is not this server's address.
: >"$out/server.out"
bazel-bin/server/pipeweaver_server --listen_address=127.0.0.1:0 \
  --metrics_address=127.0.0.1:0 >"$out/server.out" 2>"$out/server.log" &
pids+=($!)
server_pid=$!
address=
for _ in $(seq 200); do
  address=$(sed -n 's/^listening on \([^,]*\), metrics on .*/\1/p' "$out/server.out")
  [[ -n $address ]] && break
  kill -0 "$server_pid" 2>/dev/null || { echo "the server did not start:" >&2; cat "$out/server.log" >&2; exit 1; }
  sleep 0.05
done
[[ -n $address ]] || { echo "the server did not start within 10 s; see $out/server.log" >&2; exit 1; }
metrics=$(sed -n 's/^listening on .*, metrics on \(.*\)$/\1/p' "$out/server.out")
echo "planner on $address, metrics on http://$metrics/metrics"
echo

echo "durations are slept at 1/100 scale; walked: what the ranks took, scaled back (messages"
echo "and wake-ups of this machine do not scale); > BASELINE: gain over it on the same costs"
header=true
trainers=()
for job in "${jobs[@]}"; do
  "$ctl" setups "$job" --out "$out/$job" --steps "$((steps < 100 ? steps : 100))" \
    --microbatches "$microbatches"
  batches=$(printf '%s,' "$out/$job"/batch-*.textproto)
  # Other batches than those that it trains on, for the layout.
  "$ctl" setups "$job" --out "$out/$job/samples" --steps 6 --seed 1000 --microbatches "$microbatches" >/dev/null
  samples=$(printf '%s,' "$out/$job/samples"/batch-*.textproto)
  bazel-bin/client_agents/standin/pipeweaver_trainer --server="$address" \
    --job_file="$out/$job/job.textproto" --batch_files="${batches%,}" \
    --sample_files="${samples%,}" \
    --steps="$steps" --json_log="$out/$job/steps.jsonl" --header="$header" &
  pids+=($!)
  trainers+=($!)
  # The other trainer's rows come below the same head.
  header=false
done
failed=0
for pid in "${trainers[@]}"; do wait "$pid" || failed=1; done
((failed == 0)) || { echo "a trainer failed; see $out/server.log" >&2; exit 1; }

echo
echo "metrics:"
# The page, through bash's own sockets: a bare machine has no curl.
exec 3<>"/dev/tcp/${metrics%:*}/${metrics##*:}"
printf 'GET /metrics HTTP/1.0\r\nHost: %s\r\n\r\n' "$metrics" >&3
tr -d '\r' <&3 >"$out/metrics.txt"
exec 3<&- 3>&-
grep -E '^pipeweaver_(plans_sealed_total|jobs|rpc_seconds_count|planning_seconds_(sum|count)|gap_ratio_(sum|count)|steps_held|plan_bytes)' \
  "$out/metrics.txt" | grep -v ' 0$' | sed 's/^/  /'

last=$((steps - 1))
for job in "${jobs[@]}"; do
  "$ctl" trace step "$job" "$last" --server "$address" --out "$out/$job"
done
stop_all
trap - EXIT
echo
echo "left in $out: for each job a Chrome trace (.trace.json), a picture (.svg) and"
echo "the steps (steps.jsonl); the server's log"
