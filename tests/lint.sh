#!/usr/bin/env bash
# Checks the format of all C++ sources, and with --tidy also runs clang-tidy over
# them (minutes): tests/lint.sh [--tidy [FILE.cc...]]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=deploy/packages.sh
source deploy/packages.sh
install_packages git clang-format clang-tidy
git ls-files '*.h' '*.cc' | xargs clang-format --dry-run -Werror
[[ ${1:-} == --tidy ]] || exit 0
shift
# Generated headers must be there to be included.
bazel build --noshow_progress --ui_event_filters=-info //proto/...
files=("$@")
((${#files[@]})) || mapfile -t files < <(git ls-files '*.cc')
generated=$(find -L bazel-bin -type d -name _virtual_includes -prune -exec find {} -mindepth 1 -maxdepth 1 -type d \; 2>/dev/null |
  grep 'proto/pipeweaver' | sed 's/^/-I/' | tr '\n' ' ')
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" sh -c \
  'clang-tidy --quiet "$1" -- -std=c++20 -I. '"$generated"' -I/usr/local/cuda/include 2>/dev/null || { echo "clang-tidy: $1"; exit 1; }' sh
