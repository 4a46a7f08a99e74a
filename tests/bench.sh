#!/usr/bin/env bash
# Runs named benchmarks: tests/bench.sh NAME [ARGUMENT...]
#
#   search     gaps to the bound of all problem families by time, first plan by size (JSON lines)
#   paper      [--out DIR] [--quick] [PART...]: the paper's set-ups against every baseline, and more;
#              PARTs and budgets: `tests/bench.sh paper --help`; JSON lines in DIR/paper.jsonl (default
#              bench-out), plots beside it
#   problems   every problem file at --budget-ms 50, judged by the reference checker
#   serve      from submission to the last rank's program; sealed programs against a bare echo
#   planner    what a plan costs besides the search
#   partition  splitting and costing a step
#   lower      checks, lowering and serialising of a plan
#   engine     stage events a second of the step emulator
#   store      costing a step with and without the subgraph store, operations really simulated
#   accuracy   predicted against real step times of a small model, this CPU as the device
#   ops        cost rules against measured GPU ops, leaving one model out at a time
#
# These machines are shared: read ratios and spreads, not single times. Problem
# files and measured ops are read from $PIPEWEAVER_SHARED, by default ../shared.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
caller=$PWD
cd "$root"
# shellcheck source=deploy/packages.sh
source deploy/packages.sh
export PIPEWEAVER_SHARED=${PIPEWEAVER_SHARED:-$(dirname "$root")/shared}

run_target() {
  install_packages "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}"
  bazel build --noshow_progress --ui_event_filters=-info "$1"
  local binary=bazel-bin/${1#//}
  shift
  "${binary/://}" "$@"
}

name=${1:-help}
shift || true
case $name in
  search)
    if (($#)); then
      run_target //tests/bench:search_bench "$@"
    else
      run_target //tests/bench:search_bench gaps "$PIPEWEAVER_SHARED"/problems/*.json.gz
      run_target //tests/bench:search_bench scaling
    fi
    ;;
  paper)
    out=bench-out
    if [[ ${1:-} == --out ]]; then
      out=$2
      [[ $out == /* ]] || out=$caller/$out
      shift 2
    fi
    install_packages "${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}" "${BENCH_PACKAGES[@]}"
    mkdir -p "$out"
    run_target //tests/bench:paper_bench "$@" | tee "$out/paper.jsonl"
    [[ " $* " == *" --help "* ]] || /usr/bin/python3 tests/bench/plot_paper.py "$out/paper.jsonl" "$out"
    ;;
  problems)
    deploy/pipeweaverctl help >/dev/null
    python3 tests/check_problems.py --ctl bazel-bin/server/ctl/pipeweaverctl --budget-ms 50 "$@"
    ;;
  serve) run_target //server/bench:serve_benchmark "$@" ;;
  planner) run_target //search:planner_benchmark "$@" ;;
  partition) run_target //search/partition:partition_benchmark "$@" ;;
  lower) run_target //search/lower:lower_benchmark "$@" ;;
  engine) run_target //semu/engine:step_emulator_benchmark "$@" ;;
  store) run_target //tests/bench:store_bench "$@" ;;
  accuracy)
    install_packages "${BUILD_PACKAGES[@]}" "${ACCURACY_PACKAGES[@]}"
    bazel build --noshow_progress --ui_event_filters=-info //server:pipeweaver_server
    (cd client_agents/python && /usr/bin/python3 -W ignore setup.py -q protos)
    OMP_NUM_THREADS=1 /usr/bin/python3 -W ignore tests/accuracy/reality.py "$@"
    ;;
  ops) run_target //tests/ops:leave_one_out "$@" ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$root/tests/bench.sh"
    [[ $name == help ]]
    ;;
esac
