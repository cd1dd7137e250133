#!/usr/bin/env bash
# The same tests under another interpreter, in an environment of its own:  bash tests/other_python.sh python3.12
set -euo pipefail
export PYTHON="${1:?usage: bash tests/other_python.sh PYTHON [pytest arguments]}"
shift
command -v "$PYTHON" >/dev/null || { echo "there is no $PYTHON on this machine" >&2; exit 1; }
VENV=".venv-$(basename "$PYTHON")"
export VENV
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
