#!/usr/bin/env bash
# Installs what is missing, builds everything, runs every test. The last line
# reads `N passed, N failed`; the exit code is 0 when none failed. Tests that could
# not run are in neither count; a line above says how many.
#
# Reference data (problem files, traces) is read from $PIPEWEAVER_SHARED, by
# default ../shared beside the repository; tests that need it say so and skip
# where it is missing.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
# shellcheck source=deploy/packages.sh
source deploy/packages.sh
install_packages "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}" || exit 1
export PIPEWEAVER_SHARED=${PIPEWEAVER_SHARED:-$(dirname "$root")/shared}
[[ -d $PIPEWEAVER_SHARED ]] ||
  echo "no reference data in $PIPEWEAVER_SHARED: tests that need it are skipped"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0
failed=0
skipped=0

# bazel_tests TITLE ARGUMENT...: one Bazel run; each test target counts as one.
bazel_tests() {
  local title=$1
  shift
  echo "== $title"
  local status=0
  bazel test --noshow_progress --ui_event_filters=-info --keep_going \
    --test_summary=short "$@" 2>&1 | tee "$log" || status=$?
  local ran broken
  ran=$(grep -cE '^//\S+ +(\(cached\) )?PASSED' "$log")
  broken=$(grep -cE '^//\S+ +(FAILED|TIMEOUT|NO STATUS|INCOMPLETE|FLAKY)' "$log")
  # A run that breaks before its tests start, a broken build file say.
  if ((status != 0 && broken == 0)); then broken=1; fi
  local left_out
  left_out=$(grep -cE '^//\S+ +SKIPPED' "$log")
  ((left_out == 0)) || echo "$title: $left_out skipped: no CUDA toolkit on this machine"
  echo "$title: $ran passed, $broken failed"
  passed=$((passed + ran))
  failed=$((failed + broken))
  skipped=$((skipped + left_out))
}

# script_test TITLE COMMAND...: one command, passed when it exits 0.
script_test() {
  local title=$1
  shift
  echo "== $title"
  if "$@"; then
    echo "$title: passed"
    passed=$((passed + 1))
  else
    echo "$title: FAILED"
    failed=$((failed + 1))
  fi
}

# Benchmarks and tools, those too that no test runs. Those that need a CUDA
# toolkit are left out where there is none, as only a pattern may.
build_binaries() {
  local quiet=(--noshow_progress --ui_event_filters=-info)
  local binaries
  binaries=$(bazel query "${quiet[@]}" 'kind(cc_binary, //...)
    except attr(tags, manual, //...) except //profiler/cupti/...') || return
  # shellcheck disable=SC2086  # one target a word
  bazel build "${quiet[@]}" $binaries //profiler/cupti/...
}

# suite_test TITLE COMMAND...: a runner of its own whose last line reads
# `N passed, N failed`, and the one before, where tests were skipped, `N skipped`.
suite_test() {
  local title=$1
  shift
  echo "== $title"
  local status=0
  "$@" 2>&1 | tee "$log" || status=$?
  local ran broken left_out
  left_out=$(sed -n 's/^\([0-9]*\) skipped$/\1/p' "$log" | tail -1)
  read -r ran broken < <(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$log" | tail -1)
  ran=${ran:-0}
  broken=${broken:-0}
  if ((status != 0 && broken == 0)); then broken=1; fi
  passed=$((passed + ran))
  failed=$((failed + broken))
  skipped=$((skipped + ${left_out:-0}))
}

script_test "C++ format" tests/lint.sh
bazel_tests "all tests" //...
script_test "all binaries build" build_binaries
# The parsers, and the core that outside input reaches; gRPC itself is Debian's,
# without sanitizers.
bazel_tests "address and undefined-behaviour sanitizers" --config=asan \
  //tests/fuzz/... //search/lower/... //search/plan/... //search/problem/... //semu/engine/... \
  //semu/model/... //semu/cost/ops/... //semu/graph/... //semu/store/... //profiler:trace_import_test //profiler:profile_builder_test \
  //server:step_table_test //server:planning_pool_test //server:planner_core_test
# What runs on several threads; Clang checks that its locks are held as annotated.
# Of the search: its pool, and every strategy on one and on several threads.
bazel_tests "thread sanitizer, analysis of locks" --config=tsan \
  //server:step_table_test //server:planning_pool_test //server:planner_core_test \
  //server:job_costs_test //server:job_registry_test //server/testing:seeded_race_test \
  //search/lower/testing/... //search/strategy:worker_pool_test \
  //search/strategy/testing:conformance_test //semu/store:memory_store_test \
  //semu/store:subgraph_cache_test //semu/store:redis_store_test \
  //semu/store:write_behind_store_test
suite_test "Python package" client_agents/python/run_tests.sh
# After the package's tests, which install what it needs and generate its messages.
script_test "predicted against real step times, its parts" \
  env -C tests/accuracy OMP_NUM_THREADS=1 /usr/bin/python3 -W ignore -m unittest test_reality

if ((skipped)); then echo "$skipped skipped"; fi
echo "$passed passed, $failed failed"
((failed == 0))
