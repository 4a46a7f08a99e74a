#!/usr/bin/env bash
# A run of many short steps, described with comparisons that take longer than
# they do, under a server that holds few steps: every step is printed.
set -euo pipefail
server=$PWD/$1
ctl=$PWD/$2
trainer=$PWD/$3
cd "${TEST_TMPDIR:?}"
readonly steps=60

fail() {
  echo "FAILED: $1" >&2
  exit 1
}

"$ctl" setups vlm-s --out job --steps 4 --microbatches 4 > setup
exec 3< <(exec "$server" --listen_address=127.0.0.1:0 --metrics_address=none \
  --max_steps_per_replica=4 --search_budget_ms=20 2> server.log)
server_pid=$!
trap 'kill "$server_pid" 2> kill.log || true' EXIT
read -r line <&3 || fail "the server did not start: $(cat server.log)"
address=${line#listening on }

batches=$(printf '%s,' job/batch-*.textproto)
"$trainer" --server="${address%%,*}" --job_file=job/job.textproto --batch_files="${batches%,}" \
  --steps="$steps" --time_scale=0.0001 --header=false > rows ||
  fail "the trainer, after $(wc -l < rows) steps"
[[ $(wc -l < rows) == "$steps" ]] || fail "a row for each step: $(cat rows)"
