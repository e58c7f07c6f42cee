#!/usr/bin/env bash
# What someone does who reads only the README: the wheel, installed in a new environment, then the README's shell example word for word in an empty folder, with no network.
# Prints the seconds that each part took; fails if a command fails, says nothing, or if all of it took longer than five minutes.
# usage: tests/from_wheel.sh [PYTHON]
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd) python=${1:-python3} work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The fenced block that follows <!-- shell -->
awk '/^<!-- shell -->$/ {found=1; next} found && /^```/ {if (inside) exit; inside=1; next} inside' "$top/README.md" > "$work/example.sh"
[ -s "$work/example.sh" ] || { echo "README.md has no commands after <!-- shell -->" >&2; exit 1; }

git -C "$top" archive HEAD | tar x -C "$(mkdir "$work/source" && echo "$work/source")" # what is committed, and nothing that lies about
"$python" -m venv "$work/build" && "$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build -q --wheel --outdir "$work" "$work/source"

start=$SECONDS
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q -c "$top/constraints.txt" "$work"/*.whl
installed=$SECONDS
mkdir "$work/empty" && cd "$work/empty"
HF_HUB_OFFLINE=1 PATH="$work/venv/bin:$PATH" bash -euo pipefail "$work/example.sh" | tee "$work/said"
[ "$(grep -c . "$work/said")" -ge 4 ] || { echo "the commands said too little" >&2; exit 1; }
echo "installed in $((installed - start)) s, example in $((SECONDS - installed)) s"
[ $((SECONDS - start)) -le 300 ] || { echo "longer than five minutes" >&2; exit 1; }
