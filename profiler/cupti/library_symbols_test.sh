#!/bin/bash
# The library lives in other people's processes: it must show its own names only, and
# need nothing but libc and the dynamic linker.
set -euo pipefail
library=$1
wrong=$(nm -D --defined-only "$library" | awk '{print $3}' |
  grep -Ev '^(InitializeInjection|pw_cupti_[a-z]+)$' || true)
if [[ -n $wrong ]]; then
  echo "exports more than its interface: $wrong"
  exit 1
fi
for name in InitializeInjection pw_cupti_{start,step,push,pop,detach,attach,status,stop}; do
  nm -D --defined-only "$library" | grep -q " T $name\$" || { echo "$name is missing"; exit 1; }
done
needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
wrong=$(grep -Ev '^(libc\.so\.6|libdl\.so\.2|libpthread\.so\.0|ld-linux-.*)$' <<<"$needed" || true)
if [[ -n $wrong ]]; then
  echo "needs more than libc and libdl: $wrong"
  exit 1
fi
