#!/usr/bin/env bash
# Make .venv-lerobot ready: LeRobot, vlaflow and its plugin for LeRobot in an environment of their own.
#
# LeRobot 0.6 needs Python 3.12 or newer: PYTHON=/path/to/python3.12 names one that is not on the path. Several GB are
# downloaded. Run again it does nothing; an interrupted run starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-lerobot
log=$venv/install.log
fail() { printf '%s\n' "$*" >&2 && exit 1; }
suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

stamp=$({ pwd && cat pyproject.toml integrations/lerobot_policy_vlaflow/pyproject.toml tools/setup-lerobot.sh; } | sha256sum | cut -c 1-64)
[ -x $venv/bin/python ] && [ "$(cat $venv/.vlaflow-stamp 2>/dev/null)" = "$stamp" ] && exit 0

python=
for candidate in ${PYTHON:-python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python}; do
    if suits "$candidate"; then python=$candidate && break; fi
done
[ -n "$python" ] || fail "LeRobot needs Python 3.12 or newer: name one with PYTHON=/path/to/python3.12."

rm -rf $venv
"$python" -m venv $venv
if ! {
    $venv/bin/python -m pip install --disable-pip-version-check "setuptools>=77" "lerobot[training]==0.6.1" &&
        $venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation \
            --editable . --editable integrations/lerobot_policy_vlaflow
} </dev/null >$log 2>&1; then
    tail -n 15 $log >&2
    fail "The installation failed; the lines above are the end of $log. Check the network and run this again."
fi
echo "$stamp" >$venv/.vlaflow-stamp
