# Installs what is missing of the Debian packages that building, running and
# testing need. Sourced by deploy/*.sh and tests/*.sh.

# The build: Bazel with its rules, compiler, libraries.
BUILD_PACKAGES=(
  g++ bazel-bootstrap bazel-platforms bazel-rules-java bazel-rules-proto
  bazel-skylib libabsl-dev libgrpc++-dev protobuf-compiler
  protobuf-compiler-grpc libprotobuf-dev prometheus-cpp-dev libssl-dev
  libspdlog-dev nlohmann-json3-dev libcli11-dev zlib1g-dev liblmdb-dev
  libhiredis-dev libjemalloc-dev
)

# The tests, on top: GoogleTest, the fuzzers' and analysers' compiler, a real
# Prometheus to judge the metrics page, a real Redis, Python for the schedule
# checker, certificates.
TEST_PACKAGES=(
  libgtest-dev libgmock-dev libbenchmark-dev clang libclang-rt-14-dev
  prometheus python3 curl redis-server openssl
)

# The benchmarks, on top: plots.
BENCH_PACKAGES=(python3-matplotlib)

# Python's side of predicted against real step times.
ACCURACY_PACKAGES=(
  python3 python3-torch python3-grpcio python3-protobuf python3-setuptools
)

# install_packages NAME...: installs those that are missing, saying which.
install_packages() {
  local missing=() name
  for name in "$@"; do
    if [[ "$(dpkg-query -W -f='${Status}' "$name" 2>/dev/null)" != "install ok installed" ]]; then
      missing+=("$name")
    fi
  done
  ((${#missing[@]})) || return 0
  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || {
      echo "these Debian packages are missing, and there is neither root nor sudo: ${missing[*]}" >&2
      return 1
    }
    as_root=(sudo)
  fi
  echo "installing Debian packages: ${missing[*]}"
  # In a subshell, so that its traps leave the caller's alone.
  (
    # A package may bring a service; nothing here needs it started.
    policy=/usr/sbin/policy-rc.d
    made_policy=
    trap '[[ -z $made_policy ]] || "${as_root[@]}" rm -f "$policy"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if [[ ! -e $policy ]]; then
      made_policy=1
      printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
      "${as_root[@]}" chmod +x "$policy"
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends "${missing[@]}" >/dev/null
  )
}
