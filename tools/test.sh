#!/usr/bin/env bash
# Sets everything up, then runs the checks and the tests.
#
#   bash tools/test.sh              everything
#   bash tools/test.sh --fast       checks and the fast tests only
#   bash tools/test.sh -k order     what follows goes to pytest; after -- anything that it knows
#
# Test files run side by side, one process per core (four at most), each with one thread; tests that
# start ranks or measure time run alone afterwards.
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
# Before anything is installed: a slip should not cost gigabytes.
for option; do
    case "$option" in
        --) break ;;
        --fast | -[kmxqvsn] | -vv | --lf | --ff | --pdb | --durations=* | --tb=* | --maxfail=*) ;;
        -*) printf 'error: unknown option %s; see bash tools/test.sh --help\n' "$option" >&2; exit 2 ;;
    esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"

fast=
if [ "${1:-}" = "--fast" ]; then
    fast=yes
    shift
fi
[ "${1:-}" = "--" ] && shift

step() {
    printf '\n== %s\n' "$*"
    "$@"
}
# tests MARKS ARGUMENT...: pytest, where to have nothing to run is no failure
tests() {
    local code=0
    step python -m pytest -m "$@" || code=$?
    [ "$code" -eq 5 ] || return "$code"
}

started=$SECONDS
step ruff format --check .
step ruff check .
step lint-imports
step pyright
checks_seconds=$((SECONDS - started))

started=$SECONDS
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
side_by_side=(--numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile)
if [ -n "$fast" ]; then
    OMP_NUM_THREADS=1 tests "not slow and not dist and not bench" "${side_by_side[@]}" "$@"
else
    OMP_NUM_THREADS=1 tests "not dist and not bench" "${side_by_side[@]}" "$@"
    tests "dist or bench" "$@"
fi
printf '\ninstallation: %s s, checks: %s s, tests: %s s\n' \
    "$INSTALL_SECONDS" "$checks_seconds" "$((SECONDS - started))"
