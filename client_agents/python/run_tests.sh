#!/usr/bin/env bash
# Tests of the Python package on Debian's python3 and torch. The last line reads
# `N passed, N failed`; the exit code is 0 when none failed. Tests that could not run
# are in neither count: a line above says how many, those at their modules why.
#
# PIPEWEAVER_SERVER_BINARY: the planner to train under; default what bazel built of
# //server:pipeweaver_server.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here" || exit 1
# shellcheck source=../../deploy/packages.sh
source ../../deploy/packages.sh
install_packages protobuf-compiler libprotobuf-dev python3 python3-torch \
  python3-grpcio python3-protobuf python3-setuptools python3-wheel python3-pip \
  python3-numpy || exit 1
# shellcheck source=tests/unittest_counts.sh
source tests/unittest_counts.sh
python=/usr/bin/python3
"$python" -W ignore setup.py -q protos || exit 1

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export PYTHONPATH=$here:$here/tests OMP_NUM_THREADS=1
cd tests || exit 1

# Rank processes wait for each other much of the time: two at once.
run() {
  for name in "$@"; do
    local start=$SECONDS
    timeout 1500 "$python" -m unittest "$name" >"$logs/$name" 2>&1
    echo $? >"$logs/$name.status"
    echo $((SECONDS - start)) >"$logs/$name.seconds"
  done
}
first=(test_gradients test_live test_agent)
second=(test_program test_executor test_chunk test_metadata test_install test_csv_export test_cost
  test_readme test_unittest_counts test_cupti_ring test_replicas test_moves test_hangs
  test_megatron_config)
run "${first[@]}" &
run "${second[@]}"
wait

passed=0
failed=0
skipped=0
for name in "${first[@]}" "${second[@]}"; do
  log=$logs/$name
  count_tests "$log" "$(<"$log.status")"
  echo "$name: $tests_passed passed, $tests_failed failed, $tests_skipped skipped," \
    "$(<"$log.seconds") s"
  grep -E '^(agent:|random plans|live memory|skipped)' "$log"
  if ((tests_failed)); then cat "$log"; fi
  passed=$((passed + tests_passed))
  failed=$((failed + tests_failed))
  skipped=$((skipped + tests_skipped))
done
if ((skipped)); then echo "$skipped skipped"; fi
echo "$passed passed, $failed failed"
((failed == 0))
