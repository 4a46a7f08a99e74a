# shellcheck shell=bash
# For runners of Python tests: what a run of unittest says of its tests.

# count_tests LOG STATUS: sets tests_passed, tests_failed and tests_skipped, from a
# run's output and exit status. One that broke before its tests ran, or that a time
# limit ended, has one failure at least.
count_tests() {
  local ran
  ran=$(sed -n 's/^Ran \([0-9]*\) tests\?.*/\1/p' "$1" | tail -1)
  tests_failed=$(grep -cE '^(ERROR|FAIL): ' "$1")
  if (($2 != 0 && tests_failed == 0)); then tests_failed=1; fi
  tests_skipped=$(sed -nE 's/^(OK|FAILED) \(.*skipped=([0-9]+).*/\2/p' "$1" | tail -1)
  tests_skipped=${tests_skipped:-0}
  tests_passed=$((${ran:-0} - tests_failed - tests_skipped))
  if ((tests_passed < 0)); then tests_passed=0; fi
}
