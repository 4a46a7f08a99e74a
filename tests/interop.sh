#!/usr/bin/env bash
# Tests against what comes from PyPI alone: of the Python package a current torch
# (for torch.distributed.pipelining) and megatron-core, of the Kubernetes manifest
# the API's schemas. Installs them into a virtual environment once: several GB,
# some minutes. Where that works, the last line reads `N passed, N failed`; a line
# above it says how many tests were skipped.
#
# PIPEWEAVER_INTEROP_VENV: where; default ~/.cache/pipeweaver/interop.
set -uo pipefail
if (($#)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
# shellcheck source=deploy/packages.sh
source deploy/packages.sh
install_packages "${BUILD_PACKAGES[@]}" python3 python3-venv python3-setuptools ||
  exit 1
venv=${PIPEWEAVER_INTEROP_VENV:-$HOME/.cache/pipeweaver/interop}
if [[ ! -x $venv/bin/python ]]; then
  mkdir -p "$(dirname "$venv")"
  /usr/bin/python3 -m venv "$venv" || exit 1
fi
# Any torch with torch.distributed.pipelining; the Megatron that tests know.
"$venv/bin/pip" install -q 'torch>=2.5' numpy packaging 'grpcio>=1.51' \
  'protobuf>=4.21' || exit 1
"$venv/bin/pip" install -q --no-deps 'megatron-core>=0.16,<0.17' || exit 1
"$venv/bin/pip" install -q 'kubernetes-validate>=1.34,<1.38' || exit 1
"$venv/bin/python" -c \
  'import torch; print("torch", torch.__version__)' || exit 1

package=$root/client_agents/python
# shellcheck source=client_agents/python/tests/unittest_counts.sh
source "$package/tests/unittest_counts.sh"
# A bare environment, with what pip finds for the package.
bare=$(mktemp -d)
trap 'rm -rf "$bare"' EXIT
/usr/bin/python3 -m venv "$bare" && "$bare/bin/pip" install -q "$package" &&
  (cd / && "$bare/bin/python" -c 'import pipeweaver; print(pipeweaver.__file__)') ||
  exit 1
rm -rf "$bare"
(cd "$package" && /usr/bin/python3 -W ignore setup.py -q protos) || exit 1
export PYTHONPATH=$package:$package/tests:$package/interop OMP_NUM_THREADS=1

log=$(mktemp)
trap 'rm -rf "$log" "$bare"' EXIT
passed=0
failed=0
skipped=0
# run NAME...: one run of unittest.
run() {
  echo "== $*"
  local status=0
  timeout 1200 "$venv/bin/python" -W ignore -m unittest "$@" >"$log" 2>&1 ||
    status=$?
  count_tests "$log" "$status"
  if ((tests_failed)); then cat "$log"; fi
  passed=$((passed + tests_passed))
  failed=$((failed + tests_failed))
  skipped=$((skipped + tests_skipped))
}

bazel build --noshow_progress --ui_event_filters=-info //server:pipeweaver_server ||
  exit 1
cd "$root/tests/deploy" || exit 1
run test_kubernetes
cd "$package/interop" || exit 1
run test_pipelining
run test_megatron
# The executor and the agent on this torch, grpcio and protobuf as well.
run test_gradients.GradientTest.test_vlm_2ranks_v_float64_gloo \
  test_gradients.GradientTest.test_t2v_frozen_text_2ranks_straight_float32_rendezvous \
  test_gradients.GradientTest.test_omni_4ranks_straight_float64_gloo
run test_program test_executor test_chunk test_agent

if ((skipped)); then echo "$skipped skipped"; fi
echo "$passed passed, $failed failed"
((failed == 0))
