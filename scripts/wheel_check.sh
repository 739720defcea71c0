#!/usr/bin/env bash
# Builds the sdist and from it the wheel, and uses the wheel as a user would: in a fresh environment that
# sees nothing of this tree, and of what is installed only what the wheel's metadata asks for.
#
#   scripts/wheel_check.sh [FOLDER]    # keeps both files there; PYTHON has the dependencies and `build`
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"$PYTHON" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$PYTHON" -m venv --without-pip "$work/env"
pip() { "$PYTHON" -m pip --python "$work/env/bin/python" --disable-pip-version-check "$@"; }
pip install -q --no-index --no-deps "$work"/dist/*.whl
"$PYTHON" scripts/wheel_dependencies.py "$work/env" selfindex
cp -r src/selfindex "$work/expected"
cp scripts/wheel_content.py "$work"
cd "$work"
pip check
env/bin/python wheel_content.py expected
env/bin/selfindex --version
env/bin/selfindex generate --help >/dev/null
env/bin/selfindex doctor
cd - >/dev/null
if [ $# -gt 0 ]; then
  mkdir -p "$1"
  cp "$work"/dist/* "$1"
fi
echo "the wheel is complete"
