#!/usr/bin/env bash
# Sets everything up, then runs the checks and the tests.
#
#   bash tools/test.sh              everything
#   bash tools/test.sh --fast       checks and the fast tests only (under a minute)
#   bash tools/test.sh -k order     what follows goes to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"

pytest_options=()
if [ "${1:-}" = "--fast" ]; then
    shift
    pytest_options+=(-m "not slow and not dist")
fi

started=$SECONDS
step() {
    printf '\n== %s\n' "$*"
    "$@"
}
step ruff format --check .
step ruff check .
step lint-imports
step pyright
printf '\nchecks: %s s\n' "$((SECONDS - started))"

started=$SECONDS
step python -m pytest "${pytest_options[@]}" "$@"
printf '\ninstallation: %s s, tests: %s s\n' "$INSTALL_SECONDS" "$((SECONDS - started))"
