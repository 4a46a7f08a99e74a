#!/usr/bin/env bash
# search_bench on problems of its own: a line per file and budget, a table by
# family, and no silence where there is nothing to read.
set -euo pipefail
bench=$PWD/$1
cd "${TEST_TMPDIR:?}"

fail() {
  echo "FAILED: $1" >&2
  exit 1
}

problem='{"ranks": 1, "p2p_latency_ns": 0, "split_backward": false, "memory_limit_bytes": [9],
  "segments": [{"id": "a", "microbatch": 0, "stages": [{"rank": 0, "transfer_ns": 0, "choices": [
    {"name": "keep", "forward_ns": 1, "input_grad_ns": 1, "weight_grad_ns": 1,
     "activation_bytes": 1}]}]}]}'
for name in small-0 small-1 small-fused-0 v-p4-m8 v-p8-m16-fused; do
  echo "$problem" > "$name.json"
done

lines=$("$bench" gaps ./*.json)
[[ $(grep -c '"bench": "gaps"' <<< "$lines") == 25 ]] || fail "a line per file and budget: $lines"
for family in '"small", "files": 2' '"small-fused", "files": 1' '"v", "files": 2'; do
  [[ $(grep -c "\"family\": $family, \"budget_ms\": 50, \"gap\": 0.00000" <<< "$lines") == 1 ]] ||
    fail "the family $family: $lines"
done

status=0
"$bench" gaps 2> usage || status=$?
[[ $status == 2 ]] && grep -q usage usage || fail "without files: exit $status"

status=0
lines=$("$bench" gaps small-0.json absent.json 2> errors) || status=$?
[[ $status == 1 ]] && grep -q absent.json errors || fail "an absent file: exit $status"
[[ $(grep -c '"bench": "gaps"' <<< "$lines") == 5 ]] || fail "beside an absent file: $lines"
