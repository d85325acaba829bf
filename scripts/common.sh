# Shared by scripts/quickstart and scripts/test: what to install, and how to say what is going on.
# To be sourced by bash; the caller sets LOG (a file for the output of apt and pip).

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${GLIDEFS_VENV:-$PROJECT/.venv}
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Programs such as mke2fs are not in the PATH of every root shell.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Run a command with its output in the log; on failure show the end of it and return its status.
quietly() {
    local status=0
    printf '\n$ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null || status=$?
    if ((status)); then
        printf '%s failed (status %d); the end of %s:\n' "$1" "$status" "$LOG" >&2
        tail -n 15 "$LOG" >&2
    fi
    return "$status"
}

installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

# Print those of the packages that are not there.
missing_packages() {
    local package
    for package in "$@"; do
        installed "$package" || printf '%s\n' "$package"
    done
}

apt_update() {
    [[ -n ${APT_UPDATED:-} ]] && return 0
    quietly apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -q update || return 1
    APT_UPDATED=1
}

# Install packages; nothing is asked of the network when all are there.
apt_install() {
    local wanted
    mapfile -t wanted < <(missing_packages "$@")
    ((${#wanted[@]})) || return 0
    command -v apt-get >/dev/null || die "needs Debian 12 or later (apt-get); install by hand: ${wanted[*]}"
    ((EUID == 0)) || die "needs root to install: ${wanted[*]}"
    say "  apt: ${wanted[*]}"
    apt_update || die "apt-get update failed"
    quietly apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -q -y --no-install-recommends \
        install "${wanted[@]}" || die "apt could not install: ${wanted[*]}"
}

# The same for packages that not every release has: a line says what is left out.
apt_try() {
    local package
    for package in $(missing_packages "$@"); do
        if ((EUID != 0)) || ! apt_update || ! apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install "$package" \
            >>"$LOG" 2>&1 </dev/null; then
            say "  not available here: $package (what needs it is skipped)"
        fi
    done
}

# What building and running takes. Everything but the packages for tests.
BUILD_PACKAGES=(python3 python3-venv python3-dev gcc libc6-dev liburing-dev libzstd-dev libssl-dev libxxhash-dev)
# What the examples use on a device: nbdcopy, mke2fs and e2fsck.
CLIENT_PACKAGES=(libnbd-bin e2fsprogs)

# Make the virtual environment unless there is one that works.
make_venv() {
    local python=${PYTHON:-}
    if [[ -z $python ]]; then
        python=$(command -v /usr/bin/python3 || command -v python3) || die "no python3"
    fi
    # -I: nothing is imported from the directory in which this was called, perhaps as root.
    "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is $("$python" -V 2>&1); GlideFS needs Python 3.11 or later (set PYTHON)"
    if ! "$VENV/bin/python" -I -c 'import pip' >/dev/null 2>&1; then
        rm -rf "$VENV"
        quietly "$python" -I -m venv "$VENV" || die "no virtual environment in $VENV"
    fi
}

# Whether something that `pip install` reads is newer than the last one.
newer_than_stamp() {
    local stamp=$1
    shift
    [[ ! -e $stamp ]] || [[ -n $(cd "$PROJECT" && find "$@" -type f -newer "$stamp" -not -name '*.pyc' \
        -not -name '_core.*' -print -quit) ]]
}

# install_project plain           into the virtual environment, as a user would
# install_project editable        in place, with the extras for tests and development
# An environment that was made editable stays so. Nothing is done when nothing changed.
install_project() {
    local stamp=$VENV/.glidefs mode=$1
    [[ $mode == editable || $(cat "$stamp" 2>/dev/null) != editable ]] || mode=editable
    if [[ $(cat "$stamp" 2>/dev/null) == "$mode" ]]; then
        local watched=(csrc setup.py pyproject.toml glidefs/core/build.py)
        [[ $mode == editable ]] || watched+=(glidefs)
        newer_than_stamp "$stamp" "${watched[@]}" || return 0
    fi
    say "  pip: the C core and the Python packages it needs (a minute or two)"
    # Modules that no longer exist must not come back from an earlier build.
    rm -rf "$PROJECT"/build/lib* "$stamp"
    if [[ $mode == editable ]]; then
        quietly "$VENV/bin/pip" install -e "$PROJECT[test,dev]" --config-settings editable_mode=compat ||
            die "pip could not install the project"
    else
        quietly "$VENV/bin/pip" install "$PROJECT" || die "pip could not install the project"
    fi
    printf '%s\n' "$mode" >"$stamp"
}

# add_extra NAME MODULE: what an extra of pyproject.toml names, unless MODULE of it is there.
add_extra() {
    "$VENV/bin/python" -I -c "import $2" 2>/dev/null && return 0
    local wanted
    wanted=$("$VENV/bin/python" -I -c 'import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"][sys.argv[2]]))' \
        "$PROJECT/pyproject.toml" "$1") || die "no extra $1"
    mapfile -t wanted <<<"$wanted"
    quietly "$VENV/bin/pip" install "${wanted[@]}" || die "pip could not install: ${wanted[*]}"
}

# What vm-test/run takes. virtme-ng runs its parts by name, so it has to be in the PATH.
prepare_vm() {
    apt_install qemu-system-x86 kmod busybox-static file
    [[ -x $VENV/bin/vng ]] || quietly "$VENV/bin/pip" install virtme-ng || die "pip could not install virtme-ng"
}
