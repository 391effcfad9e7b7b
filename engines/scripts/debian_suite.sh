# Sourced: apt on a suite of Debian for one script. The suite is added to this machine's own mirror
# for that script alone: apt's settings, lists and keys on the machine stay as they are, and nothing
# is installed.
#
#   use_debian_suite WORK ARCHITECTURE    sets apt_options, with everything of apt below WORK
suite=${SSD_DEBIAN_SUITE:-trixie}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

use_debian_suite() {
    local work=$1 architecture=$2 mirror tool
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null || { echo "needs $tool: a Debian or Ubuntu machine" >&2; exit 1; }
    done
    # The main archive of this machine: the first one of a *.sources or *.list file that is no security one.
    mirror=$(cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' |
        grep -E '/debian/?$' | head -n 1 || true)
    [ -n "$mirror" ] || { echo "no Debian mirror in /etc/apt: give the files with -DONNXRUNTIME_ROOT=DIR" >&2; exit 1; }
    mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/deb"
    echo "deb [signed-by=$keyring] $mirror $suite main" > "$work/sources.list"
    : > "$work/status" # nothing is installed, so that all that a package needs is fetched with it
    apt_options=(
        -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=-"
        -o "Dir::State::lists=$work/lists" -o "Dir::State::status=$work/status"
        -o "Dir::Cache::archives=$work/archives" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
        -o "APT::Architecture=$architecture" -o "APT::Architectures::=$architecture"
        -o "APT::Sandbox::User=root" -o "Debug::NoLocking=1" -qq)
    apt-get "${apt_options[@]}" update
}
