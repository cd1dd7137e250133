#!/usr/bin/env bash
# The main job: cold start, ELPO, and GRPO under the same rollout budget, on the machine at hand.
#   bash experiments/quickstart.sh [WORKDIR [--set KEY=VALUE ...]]      (WORKDIR defaults to runs/quickstart)
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n 's/^# \{0,1\}//; 2,3p' "$0"; exit 0 ;;
  -*) echo "the first argument is the folder of the run, not $1: bash experiments/quickstart.sh runs/mine $*" >&2; exit 2 ;;
esac
workdir="${1:-runs/quickstart}"
[ $# -gt 0 ] && shift
case "$workdir" in /*) ;; *) workdir="$PWD/$workdir" ;; esac
# shellcheck source=experiments/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
resume=""
[ -f "$workdir/config.json" ] && resume="--resume"
exec python -m experiments.run experiments/quickstart.py --workdir "$workdir" $resume "$@"
