#!/bin/bash
# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
#
# Sets up everything the project needs on a Debian 12: Debian packages (as root) and .venv.
# Does only what is not done already; `make demo` and `make test` run it each time.
# What apt and pip print goes to build/setup.log, and to the terminal when they fail.

set -euo pipefail
cd "$(dirname "$0")/.."

LOG=build/setup.log
STAMP=.venv/setup.sha256
PYTHON=/usr/bin/python3

say() { printf 'setup: %s\n' "$*"; }

# quietly COMMAND...: run it with its output in the log; show the log's end if it fails.
quietly() {
    local from
    from=$(($(wc -l <"$LOG") + 1))
    printf '\n$ %s\n' "$*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1 </dev/null; then
        say "this failed: $*" >&2
        tail -n "+$from" "$LOG" | tail -n 40 >&2
        say "all of its output is in $LOG" >&2
        exit 1
    fi
}

missing_packages() {
    local package
    for package in $(sed -e 's/#.*//' -e 's/[[:space:]].*//' tools/packages.txt); do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
    done
}

install_packages() {
    local packages
    mapfile -t packages < <(missing_packages)
    [[ ${#packages[@]} -gt 0 ]] || return 0
    if [[ $(id -u) != 0 ]]; then
        say "these Debian packages are missing, and only root can install them: ${packages[*]}" >&2
        exit 1
    fi
    # No service is started by being installed: the project starts what it needs itself, and
    # nothing of ours may take port 80 or 6653 on this machine.
    local policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        # shellcheck disable=SC2064
        trap "rm -f $policy" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    say "reading Debian's package lists"
    quietly apt-get update -q
    say "installing Debian packages: ${packages[*]}"
    quietly apt-get install -q -y --no-install-recommends "${packages[@]}"
    if [[ -e /usr/sbin/policy-rc.d && -n $(trap -p EXIT) ]]; then
        rm -f $policy
        trap - EXIT
    fi
    # Where systemd runs, the servers would start at the next boot.
    if [[ -d /run/systemd/system ]]; then
        local package service
        for package in "${packages[@]}"; do
            case $package in
                nginx-light) service=nginx ;;
                haproxy) service=haproxy ;;
                *) continue ;;
            esac
            say "keeping the system's own $service service from starting"
            quietly systemctl disable --now "$service"
        done
    fi
}

# What .venv depends on: the pinned requirements, the project's metadata, and where it lies
# (a virtual environment and an editable installation both hold absolute paths).
fingerprint() {
    { pwd; cat requirements-build.txt requirements.txt requirements-dev.txt setup.cfg pyproject.toml "$0"; } |
        sha256sum | cut -d' ' -f1
}

pip_install() { quietly .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@"; }

install_venv() {
    local wanted
    wanted=$(fingerprint)
    if [[ -x .venv/bin/python && -r $STAMP && $(<"$STAMP") == "$wanted" ]]; then
        return 0
    fi
    if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv from $PYTHON"
        # Mininet's Python package is Debian's: the environment has to see the system's packages.
        quietly $PYTHON -m venv --clear --system-site-packages .venv
    fi
    rm -f "$STAMP"
    say "installing Ryu: $(grep '^ryu==' requirements.txt)"
    # Ryu builds neither with a current setuptools nor in an isolated build (docs/adr/0005-setup.md).
    pip_install -r requirements-build.txt
    pip_install --no-build-isolation --no-deps "$(grep '^ryu==' requirements.txt)"
    say "installing $(grep -c == requirements.txt) Python packages that the application needs"
    pip_install -r requirements.txt
    say "installing $(grep -c == requirements-dev.txt) Python packages for tests, lint and benchmarks"
    pip_install -r requirements-dev.txt
    say "installing lbapp itself, editable"
    pip_install --no-build-isolation --no-deps -e .
    printf '%s\n' "$wanted" >"$STAMP"
    say "done; .venv/bin/lbapp is the command"
}

mkdir -p build
exec 9>build/setup.lock
flock 9
touch "$LOG"
install_packages
install_venv
# Without its programs the fast path is not there, and everything works through Open vSwitch alone.
quietly .venv/bin/python -m lbapp.dataflow.fastpath.build
