# Sourced by the scripts: makes .venv with what the project needs, if it is not there, and activates it.
# PYTHON picks the interpreter (default python3), VENV the folder, EXTRA more requirement files.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "elpo_jax needs Python 3.11 or newer, and $PYTHON is $("$PYTHON" --version 2>&1): set PYTHON=python3.11 (or newer)." >&2
  exit 1
fi
requirements="requirements.txt ${EXTRA:-}"
# The stamp holds the requirements that are installed, so that a changed list is installed again.
stamp="$VENV/.installed"
# shellcheck disable=SC2086
if [ ! -f "$stamp" ] || ! cat $requirements | cmp -s - "$stamp"; then
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || exit 1
  echo "installing into $VENV (a minute or two the first time)"
  # shellcheck disable=SC2046
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $requirements) || exit 1
  cat $requirements > "$stamp"
fi
# shellcheck disable=SC1091
. "$VENV/bin/activate"
# XLA on the CPU asks the system for fresh pages at every call unless malloc keeps them: a third of the training speed.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
