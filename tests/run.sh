#!/usr/bin/env bash
# Every test, in an environment that this script sets up:  bash tests/run.sh [pytest arguments]
set -euo pipefail
export EXTRA="tests/requirements.txt"
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../experiments/env.sh"
ruff check .
ruff format --check .
exec python -m pytest "$@"
