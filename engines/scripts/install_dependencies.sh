#!/usr/bin/env bash
# Installs what building and testing ssd_runtime takes, on Debian and Ubuntu, as root. ONNX Runtime
# itself is not among it: see fetch_onnxruntime_headers.sh and the options of CMake.
set -euo pipefail
build=(cmake g++ pkg-config nlohmann-json3-dev libssl-dev libpng-dev libonig-dev)
tests=(clang valgrind g++-aarch64-linux-gnu qemu-user)
command -v apt-get >/dev/null || { echo "needs apt-get; install by hand: ${build[*]}" >&2; exit 1; }
missing=()
for package in "${build[@]}" "${tests[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
