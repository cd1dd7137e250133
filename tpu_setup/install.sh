#!/usr/bin/env bash
# Prepares a TPU VM (or a GPU machine) and shows what JAX sees there:
#   bash tpu_setup/install.sh [tpu|cuda13|cpu]
# Then: source .venv/bin/activate && python -m experiments.run experiments/quickstart.py --workdir runs/tpu
set -euo pipefail
kind="${1:-tpu}"
case "$kind" in tpu | cuda13 | cpu) ;; *) echo "usage: bash tpu_setup/install.sh [tpu|cuda13|cpu]" >&2; exit 2 ;; esac
# TPU VM images often have a python3 that is too old and no venv module.
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      export PYTHON="$candidate"
      break
    fi
  done
fi
: "${PYTHON:?found no Python 3.11 or newer with the venv module: install python3.11 and python3.11-venv}"
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../experiments/env.sh"
[ "$kind" = cpu ] || python -m pip install --quiet --upgrade "jax[$kind]"
python tpu_setup/check.py
