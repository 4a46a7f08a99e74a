#!/usr/bin/env bash
# Tests of the executor and the CUPTI agent on an NVIDIA GPU, one is enough, and
# measurements: step times and memory against the planner's predictions, the
# agent's cost. The last line reads `N passed, N failed`. No part of tests/run.sh.
#
# PIPEWEAVER_PYTHON: a Python 3 with torch 2.5 or later (CUDA), grpcio and protobuf;
# default python3. PIPEWEAVER_SERVER_BINARY, PIPEWEAVER_CUPTI_AGENT: default what
# bazel builds here.
set -uo pipefail
if (($#)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PIPEWEAVER_PYTHON:-python3}
package=$root/client_agents/python
cd "$root" || exit 1
"$python" -c 'import torch; torch.cuda.init(); print(torch.cuda.get_device_name())' ||
  exit 1
if [[ -z ${PIPEWEAVER_SERVER_BINARY:-} || -z ${PIPEWEAVER_CUPTI_AGENT:-} ||
      ! -e $package/pipeweaver/v1/job_pb2.py ]]; then
  # shellcheck source=deploy/packages.sh
  source deploy/packages.sh
  install_packages "${BUILD_PACKAGES[@]}" || exit 1
  bazel build --noshow_progress --ui_event_filters=-info \
    //server:pipeweaver_server //profiler/cupti:libpipeweaver_cupti.so || exit 1
  (cd "$package" && "$python" -W ignore setup.py -q protos) || exit 1
fi
# shellcheck source=client_agents/python/tests/unittest_counts.sh
source "$package/tests/unittest_counts.sh"
export PIPEWEAVER_CUPTI_AGENT=${PIPEWEAVER_CUPTI_AGENT:-$root/bazel-bin/profiler/cupti/libpipeweaver_cupti.so}
export PYTHONPATH=$package:$package/tests:$package/examples:$package/gpu

cd "$package/gpu" || exit 1
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
timeout 900 "$python" -W ignore -m unittest -v test_gpu >"$log" 2>&1 || status=$?
cat "$log"
count_tests "$log" "$status"
timeout 300 "$python" measure.py costs || tests_failed=$((tests_failed + 1))
timeout 300 "$python" measure.py overhead || tests_failed=$((tests_failed + 1))
timeout 300 "$python" measure.py overhead --without-agent ||
  tests_failed=$((tests_failed + 1))
if ((tests_skipped)); then echo "$tests_skipped skipped"; fi
echo "$tests_passed passed, $tests_failed failed"
((tests_failed == 0))
