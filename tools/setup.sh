#!/usr/bin/env bash
# Sets up everything that the project needs, once; sourced by quickstart.sh and test.sh.
# Leaves $PYTHON (the interpreter of .venv) and $INSTALL_SECONDS. Safe to run again: what is there
# is left alone, and an unchanged pyproject.toml is not installed twice.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON="$ROOT/.venv/bin/python"
INSTALL_STARTED=$SECONDS

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found; install one (on Debian and Ubuntu: apt-get install python3)"
}

# ffcv is compiled on installation; it is an interoperability check and a benchmark peer only.
FFCV_PACKAGES=(python3-dev g++ pkg-config libturbojpeg0-dev libopencv-dev)

# install_packages "what works without them" PACKAGE...   0 if all of them are there afterwards
install_packages() {
    local without=$1 missing=() become=() package
    shift
    command -v dpkg-query >/dev/null || {
        say "setup: not a Debian-like system, so $* are not installed; without them $without"
        return 1
    }
    for package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
            become=(sudo)
        else
            say "setup: run as root: apt-get install ${missing[*]}   (without them $without)"
            return 1
        fi
    fi
    say "setup: installing system packages: ${missing[*]}"
    "${become[@]}" apt-get update -qq &&
        "${become[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        { say "setup: apt-get could not install ${missing[*]}; without them $without"; return 1; }
}

make_environment() {
    "$PYTHON" -m pip --version >/dev/null 2>&1 && return
    "$PYTHON" -m ensurepip >/dev/null 2>&1 && return # made by a tool that leaves pip out
    local python
    python=$(find_python)
    say "setup: creating .venv with $("$python" --version)"
    # An interrupted creation leaves no bin/python or no pip: start over then.
    rm -rf "$ROOT/.venv"
    if ! "$python" -m venv "$ROOT/.venv" >/dev/null 2>&1; then
        rm -rf "$ROOT/.venv"
        fail "'$python -m venv' does not work here; install the package python3-venv as root (apt-get install python3-venv), then run this again"
    fi
}

# shards/ is imported as headrace.shards. Python follows the hook of the editable install; type
# checkers, which run no hooks, follow these links.
link_packages() {
    local folder
    mkdir -p "$ROOT/.venv/links/headrace"
    for folder in shards pipelines training tools; do
        ln -sfn "../../../$folder" "$ROOT/.venv/links/headrace/$folder"
    done
}

install_project() {
    local stamp="$ROOT/.venv/installed-from" wanted
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/tools/setup.sh" | cksum; echo "$ROOT")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    say "setup: installing the project and what it needs (torch with CUDA is several GB; minutes)"
    "$PYTHON" -m pip install --quiet --upgrade pip
    "$PYTHON" -m pip install --quiet --editable "$ROOT[dali,parquet,dev]"
    if ! "$PYTHON" -m pip install --quiet --editable "$ROOT[ffcv]" >"$ROOT/.venv/ffcv.log" 2>&1; then
        say "setup: ffcv could not be built (see .venv/ffcv.log; it needs ${FFCV_PACKAGES[*]}); everything but the comparison with ffcv works"
    fi
    "$PYTHON" -c 'import torch, torchvision, timm' ||
        fail "torch, torchvision and timm are installed but do not import together; delete .venv and run this again"
    link_packages
    printf '%s\n' "$wanted" >"$stamp"
}

install_packages "python3 -m venv may not work" python3-venv || true
install_packages "everything but the comparison with ffcv works" "${FFCV_PACKAGES[@]}" || true
make_environment
install_project
INSTALL_SECONDS=$((SECONDS - INSTALL_STARTED))
say "setup: ready in ${INSTALL_SECONDS} s ($("$PYTHON" -c 'import platform
from importlib.metadata import version
packages = [f"{name} {version(name)}" for name in ("torch", "timm", "numpy")]
print(", ".join([f"python {platform.python_version()}", *packages]))'))"
