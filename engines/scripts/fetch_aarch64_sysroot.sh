#!/usr/bin/env bash
# Unpacks what ssd_runtime links with and runs on, for aarch64, from Debian 13.
#
#   fetch_aarch64_sysroot.sh FOLDER
#
# FOLDER becomes a sysroot for cmake/aarch64-linux-gnu.cmake and for `qemu-aarch64 -L FOLDER`: ONNX
# Runtime, OpenSSL, libpng, Oniguruma, nlohmann-json, the C and C++ libraries. Nothing is installed.
set -euo pipefail
folder=${1:?usage: fetch_aarch64_sysroot.sh FOLDER}
. "$(dirname "$0")/debian_suite.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
use_debian_suite "$work" arm64
packages=(libonnxruntime-dev libonnxruntime1.21 libssl-dev libpng-dev libonig-dev nlohmann-json3-dev
    libc6 libstdc++6)
apt-get "${apt_options[@]}" --download-only --no-install-recommends -y install "${packages[@]}"
mkdir -p "$folder"
for deb in "$work"/archives/*.deb; do
    case ${deb##*/} in
    libc6-dev_* | linux-libc-dev_*) ;; # headers of the C library are the compiler's own
    *) dpkg-deb -x "$deb" "$folder" ;;
    esac
done
# As in Debian 13, whose packages have everything below usr/.
[ -e "$folder/lib" ] || ln -s usr/lib "$folder/lib"
