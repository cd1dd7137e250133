# Sourced by the scripts: makes .venv with what the project needs, if it is not there, and activates it.
# PYTHON picks the interpreter of a new one (default python3), VENV the folder, EXTRA more requirement files.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "elpo_jax needs Python 3.11 or newer, and $PYTHON is $("$PYTHON" --version 2>&1): set PYTHON=python3.11 (or newer)." >&2
  exit 1
fi
# Python compiles what is imported and keeps it; compiling all that is installed takes as long as installing it.
unset PYTHONDONTWRITEBYTECODE
for list in requirements.txt ${EXTRA:-}; do
  # The stamp is the list that is installed, so that a changed one is installed again.
  stamp="$VENV/.installed-${list//\//-}"
  cmp -s "$list" "$stamp" && continue
  # A venv that failed half way (Debian without python3-venv) has a python and no pip.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$VENV" || exit 1
  echo "installing $list into $VENV (a minute or two the first time)"
  "$VENV/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check -r "$list" || exit 1
  cp "$list" "$stamp"
done
# shellcheck disable=SC1091
. "$VENV/bin/activate"
# XLA on the CPU asks the system for fresh pages at every call unless malloc keeps them, and huge ones: a quarter of the
# time of an update.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
