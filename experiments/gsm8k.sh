#!/usr/bin/env bash
# GSM8K from the published files to a report:  bash experiments/gsm8k.sh PATH [WORKDIR] [--resume, --set KEY=VALUE ...]
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: bash experiments/gsm8k.sh PATH [WORKDIR], where PATH has GSM8K's train.jsonl and test.jsonl" >&2
  exit 2
fi
from="$(realpath "$1")"
workdir="$(realpath -m "${2:-runs/gsm8k}")"
shift "$(($# < 2 ? $# : 2))"
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ ! -f data/gsm8k/manifest.json ]; then
  python -m elpo_jax.tasks.prepare gsm8k --from "$from" --out data/gsm8k --format jsonl
fi
exec python -m experiments.run experiments/gsm8k.py --workdir "$workdir" "$@"
