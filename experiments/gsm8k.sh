#!/usr/bin/env bash
# GSM8K from the published train.jsonl and test.jsonl to a report; stopped, the same command goes on where it was.
#   bash experiments/gsm8k.sh PATH [WORKDIR [--set KEY=VALUE ...]]      (WORKDIR defaults to runs/gsm8k)
set -euo pipefail
case "${1:-}" in
  "" | -*) sed -n 's/^# \{0,1\}//; 2,3p' "$0"; [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; exit ;;
esac
if [ ! -e "$1" ]; then
  echo "$1 does not exist: give the folder with GSM8K's train.jsonl and test.jsonl" >&2
  exit 2
fi
from="$(realpath "$1")"
workdir="$(realpath -m "${2:-runs/gsm8k}")"
shift "$(($# < 2 ? $# : 2))"
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ ! -f data/gsm8k/manifest.json ]; then
  python -m elpo_jax.tasks.prepare gsm8k --from "$from" --out data/gsm8k
fi
resume=""
[ -f "$workdir/config.json" ] && resume="--resume"
exec python -m experiments.run experiments/gsm8k.py --workdir "$workdir" $resume "$@"
