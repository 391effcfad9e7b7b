#!/usr/bin/env bash
# Unpacks ONNX Runtime's public headers, and its library for another architecture, from Debian 13.
#
#   fetch_onnxruntime_headers.sh FOLDER [ARCHITECTURE]
#
# FOLDER then has include/onnxruntime/*.h; with ARCHITECTURE (such as arm64) also lib/ with
# libonnxruntime.so of that architecture. The suite is added to this machine's own Debian mirror for
# this one call: apt's settings, lists and keys on the machine stay as they are, and nothing is
# installed. The C API is versioned, so newer libraries serve programs built with these headers.
set -euo pipefail
folder=${1:?usage: fetch_onnxruntime_headers.sh FOLDER [ARCHITECTURE]}
architecture=${2:-$(dpkg --print-architecture)}
suite=${SSD_DEBIAN_SUITE:-trixie}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { echo "needs $tool: a Debian or Ubuntu machine" >&2; exit 1; }
done
# The main archive of this machine: the first one of a *.sources or *.list file that is no security one.
mirror=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
    sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' |
    grep -E '/debian/?$' | head -n 1 || true)
[ -n "$mirror" ] || { echo "no Debian mirror in /etc/apt: give the headers with -DONNXRUNTIME_ROOT=DIR" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/deb"
echo "deb [signed-by=$keyring] $mirror $suite main" > "$work/sources.list"
apt_options=(
    -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=-"
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache::archives=$work/archives"
    -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o "APT::Architecture=$architecture"
    -o "APT::Architectures::=$architecture" -o "APT::Sandbox::User=root" -qq)
apt-get "${apt_options[@]}" update
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
