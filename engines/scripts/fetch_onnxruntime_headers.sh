#!/usr/bin/env bash
# Unpacks ONNX Runtime's public headers, and its library for another architecture, from Debian 13.
#
#   fetch_onnxruntime_headers.sh FOLDER [ARCHITECTURE]
#
# FOLDER then has include/onnxruntime/*.h; with ARCHITECTURE (such as arm64) also lib/ with
# libonnxruntime.so of that architecture. The C API is versioned, so newer libraries serve programs
# built with these headers.
set -euo pipefail
folder=${1:?usage: fetch_onnxruntime_headers.sh FOLDER [ARCHITECTURE]}
architecture=${2:-$(dpkg --print-architecture)}
. "$(dirname "$0")/debian_suite.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
use_debian_suite "$work" "$architecture"
packages=(libonnxruntime-dev)
[ "$architecture" = "$(dpkg --print-architecture)" ] || packages+=("libonnxruntime1.21")
for package in "${packages[@]}"; do
    (cd "$work/deb" && apt-get "${apt_options[@]}" download "$package:$architecture")
done
for deb in "$work"/deb/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done
mkdir -p "$folder"
cp -r "$work/root/usr/include" "$folder/"
if [ ${#packages[@]} -gt 1 ]; then
    mkdir -p "$folder/lib"
    cp -P "$work/root/usr/lib/"*/libonnxruntime*.so* "$folder/lib/"
fi
