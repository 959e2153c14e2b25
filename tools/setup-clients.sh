#!/usr/bin/env bash
# Make .venv-clients ready: a robot's own environment, with the stock openpi-client and without vlaflow.
#
# Needs .venv, whose Python it takes. Run again it does nothing; an interrupted run starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-clients
fail() { printf '%s\n' "$*" >&2 && exit 1; }

[ -x .venv/bin/python ] || fail "There is no .venv yet: make setup-dev makes it."
stamp=$({ pwd && cat tools/clients.txt tools/setup-clients.sh; } | sha256sum | cut -c 1-64)
[ -x $venv/bin/python ] && [ "$(cat $venv/.vlaflow-stamp 2>/dev/null)" = "$stamp" ] && exit 0

rm -rf $venv
.venv/bin/python -m venv $venv
if ! $venv/bin/python -m pip install --disable-pip-version-check --no-deps --requirement tools/clients.txt \
    </dev/null >$venv/install.log 2>&1; then
    tail -n 15 $venv/install.log >&2
    fail "The installation failed; the lines above are the end of $venv/install.log. Check the network and run this again."
fi
echo "$stamp" >$venv/.vlaflow-stamp
