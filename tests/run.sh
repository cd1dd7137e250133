#!/usr/bin/env bash
# Every test, in an environment that this script sets up:  bash tests/run.sh [pytest arguments]
set -euo pipefail
export EXTRA="tests/requirements.txt"
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../experiments/env.sh"
ruff check .
ruff format --check .
# A process for each core; with more than four the longest file decides. TEST_PROCESSES=0: all in one, for a debugger.
processes="${TEST_PROCESSES:-$(python -c 'import os; n = min(4, len(os.sched_getaffinity(0))); print(n if n > 1 else 0)')}"
exec python -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder "$@"
