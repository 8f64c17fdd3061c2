#!/usr/bin/env bash
# Every check and the quick tests. More tests: scripts/test.sh -m slow (any pytest arguments).
set -euo pipefail
source "$(dirname "$0")/env.sh"

ruff format --check .
ruff check .
basedpyright
lint-imports --no-cache
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then
    python -m pytest "$@"
else
    python -m pytest -n 2 --dist loadfile
fi
