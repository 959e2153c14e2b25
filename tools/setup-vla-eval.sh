#!/usr/bin/env bash
# Make .venv-vla-eval ready: AllenAI's vla-eval and LIBERO, as its container has them.
#
# Torch, LIBERO and what else .venv has is taken from there; vla-eval and what only it needs is installed. Run again it does
# nothing; an interrupted run starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-vla-eval
fail() { printf '%s\n' "$*" >&2 && exit 1; }

[ -x .venv/bin/python ] || fail "There is no .venv yet: make setup-dev makes it."
stamp=$({ pwd && cat tools/vla-eval.txt tools/setup-vla-eval.sh; } | sha256sum | cut -c 1-64)
[ -x $venv/bin/python ] && [ "$(cat $venv/.vlaflow-stamp 2>/dev/null)" = "$stamp" ] && exit 0

rm -rf $venv
.venv/bin/python -m venv $venv
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
if ! $venv/bin/python -m pip install --disable-pip-version-check --no-deps --requirement tools/vla-eval.txt \
    </dev/null >$venv/install.log 2>&1; then
    tail -n 15 $venv/install.log >&2
    fail "The installation failed; the lines above are the end of $venv/install.log. Check the network and run this again."
fi
.venv/bin/python -c "$packages" >"$($venv/bin/python -c "$packages")/vlaflow.pth"
echo "$stamp" >$venv/.vlaflow-stamp
