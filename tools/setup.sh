#!/usr/bin/env bash
# Make .venv ready: tools/setup.sh demo|libero|dev
#
# "demo" is what `make demo` needs, "libero" adds LIBERO, "dev" adds LIBERO, transformers, the development tools and a browser.
# Everything is pinned by constraints.txt. Run again it does nothing; after an interrupted run it starts over, because a package
# that was killed half-way can look complete to pip. Here live Python, packages, GL libraries and the browser; what is then run
# is in the Makefile.
#
#   .venv/.vlaflow-installing       present while an installation is under way, so left behind by one that was killed
#   .venv/.vlaflow-stamp-LEVEL      hash of what was installed, written last
#   .venv/.vlaflow-install-seconds  how long installing into this .venv took in all, GL libraries included
#   .venv/.vlaflow-gl               the value of MUJOCO_GL that drew a picture on this machine
#   .venv/.vlaflow-no-browser       there is no Chromium and none could be installed; remove it to have it tried again
set -euo pipefail
cd "$(dirname "$0")/.."

level=${1:-}
case $level in demo | libero | dev) ;; *) echo "usage: tools/setup.sh demo|libero|dev" >&2 && exit 2 ;; esac

extras=$level
[ "$level" != libero ] || extras=demo,libero

venv=.venv
log=$venv/install.log
gl_packages=(libegl1 libgl1-mesa-dri libopengl0)
cv2_packages=(libgl1 libglib2.0-0) # of OpenCV, which LIBERO's robosuite imports

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*" && exit 1; }

# Two `make` at once: the second waits. The lock is on this file itself, so nothing is left behind.
exec 9<tools/setup.sh
if command -v flock >/dev/null; then flock 9; fi

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# apt_install PACKAGE...: quietly, and only where that is possible without asking anybody.
apt_install() {
    command -v apt-get >/dev/null && as_root true || return 1
    {
        as_root apt-get update || true # an unreachable source need not matter
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
    } </dev/null >>"$log" 2>&1
}

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer."
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13; do
        if suits "$candidate"; then echo "$candidate" && return; fi
    done
    fail "vlaflow needs Python 3.11 or newer and found $(python3 --version 2>/dev/null || echo none): install one, or name it with PYTHON=/path/to/python3.11."
}

# The folder counts too: a .venv does not survive being moved.
fingerprint() { { pwd && cat constraints.txt pyproject.toml tools/setup.sh; } | sha256sum | cut -c 1-64; }

is_done() { [ -x $venv/bin/python ] && [ -x $venv/bin/vlaflow ] && [ "$(cat "$venv/.vlaflow-stamp-$1" 2>/dev/null)" = "$(fingerprint)" ]; }

has_pip() { $venv/bin/python -m pip --version >/dev/null 2>&1; }

# Works, and was made in this folder (scripts in a moved .venv point to the old place).
is_sound() { grep -qsF "$PWD/$venv" $venv/bin/activate && has_pip; }

# Nothing is lost with it: one of our files lies in it, it is empty, or it is a virtual environment without a working pip.
is_disposable() {
    compgen -G "$venv/.vlaflow-*" >/dev/null || rmdir $venv 2>/dev/null || { [ -e $venv/pyvenv.cfg ] && ! has_pip; }
}

make_venv() {
    local python
    python=$(find_python)
    mkdir -p $venv
    touch $venv/.vlaflow-installing
    if "$python" -m venv $venv >>"$log" 2>&1; then return; fi
    # Debian ships Python without ensurepip.
    local package
    package=$("$python" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')
    apt_install "$package" && "$python" -m venv $venv >>"$log" 2>&1 ||
        fail "$python cannot make a virtual environment: install $package (Debian, Ubuntu) and run this again."
}

install() {
    if [ -e $venv/.vlaflow-installing ] || { [ -e $venv ] && ! is_sound && is_disposable; }; then
        say "The last installation did not finish, or the folder was moved: starting over."
        rm -rf $venv
    fi
    if [ ! -e $venv ]; then
        make_venv
    elif ! is_sound; then
        fail ".venv exists, was not made here and cannot be used: move it away and run this again."
    fi
    touch $venv/.vlaflow-installing

    say "Installing the pinned packages into .venv (mostly download; everything is in $log) ..."
    # Not compiled here: that would double the time, for modules of which few are ever imported (see compile_imports).
    pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt)
    if ! {
        "${pip[@]}" setuptools &&
            "${pip[@]}" --no-build-isolation --editable ".[$extras]"
    } </dev/null 2>&1 | tee -a "$log" | { grep --line-buffered -E '^ *Downloading .*[0-9]{2} MB|^Installing' || true; } | cut -c 1-110 >&2; then
        tail -n 15 "$log" >&2
        fail "The installation failed; the lines above are the end of $log. Check the network and run this again."
    fi
    rm -f $venv/.vlaflow-stamp-* # of an older set
    rm $venv/.vlaflow-installing
    fingerprint >"$venv/.vlaflow-stamp-$level"
    changed=yes
}

# Asking for a picture says more than asking for packages: drivers come from many places.
draws() {
    MUJOCO_GL=$1 $venv/bin/python - >>"$log" 2>&1 <<'PROBE'
import os
import mujoco

model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
drawn = bool(renderer.render().any())
os._exit(0 if drawn else 1)  # closing a GL context at exit is noisy and sometimes fatal
PROBE
}

find_gl() {
    local backend
    changed=yes
    for backend in ${MUJOCO_GL:-egl osmesa}; do
        if draws "$backend"; then echo "$backend" >$venv/.vlaflow-gl && return; fi
    done
    return 1
}

setup_gl() {
    [ -e $venv/.vlaflow-gl ] && return
    find_gl && return
    say "MuJoCo cannot draw without a display yet: installing ${gl_packages[*]} ..."
    if apt_install "${gl_packages[@]}" && find_gl; then return; fi
    if apt_install libosmesa6 && find_gl; then return; fi
    say "MuJoCo cannot draw without a display: install EGL and Mesa's software driver" \
        "(Debian, Ubuntu: sudo apt install ${gl_packages[*]}) and run this again."
    [ "$level" = dev ] # developers may go on: most tests need no picture
}

setup_cv2() {
    $venv/bin/python -c 'import cv2' >>"$log" 2>&1 && return
    say "OpenCV cannot be imported yet: installing ${cv2_packages[*]} ..."
    changed=yes
    if apt_install "${cv2_packages[@]}" && $venv/bin/python -c 'import cv2' >>"$log" 2>&1; then return; fi
    say "LIBERO cannot be imported: install OpenCV's libraries (Debian, Ubuntu: sudo apt install ${cv2_packages[*]})."
}

# For the tests of the page of `vlaflow serve --dashboard`; without one they are skipped, and say so.
setup_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v $name >/dev/null; then return; fi
    done
    [ -e $venv/.vlaflow-no-browser ] && return
    say "Installing Chromium, for the tests of the dashboard ..."
    changed=yes
    if apt_install chromium && command -v chromium >/dev/null; then return; fi
    touch $venv/.vlaflow-no-browser
    say "There is no Chromium: the tests of the dashboard's page will be skipped (Debian, Ubuntu: sudo apt install chromium)."
}

# Each process would compile these again, for 2 to 5 s, where Python is asked to write no bytecode (PYTHONDONTWRITEBYTECODE).
compile_imports() {
    local modules=(accelerate av gymnasium jinja2 matplotlib.pyplot metaworld mujoco pyarrow.parquet rich.progress safetensors.torch
        scipy.fft scipy.stats torch._dynamo torch.distributed.fsdp torch.distributed.run websockets.asyncio.server)
    [ "$level" = demo ] || modules+=(robosuite)
    [ "$level" != dev ] || modules+=(hypothesis mypy.main pytest transformers xdist)
    say "Compiling what is imported ..."
    PYTHONDONTWRITEBYTECODE='' $venv/bin/python - "${modules[@]}" >>"$log" 2>&1 <<'IMPORT' || say "Some modules could not be imported ($log)."
import importlib
import sys
import traceback

missing = 0
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        traceback.print_exc()
        missing += 1
sys.exit(missing)
IMPORT
}

changed=
is_done dev || is_done "$level" || { [ "$level" = demo ] && is_done libero; } || install
setup_gl
[ "$level" = demo ] || setup_cv2
[ "$level" != dev ] || setup_browser
if [ -n "$changed" ]; then
    compile_imports
    before=$(cat $venv/.vlaflow-install-seconds 2>/dev/null || echo 0)
    echo $((before + SECONDS)) >$venv/.vlaflow-install-seconds
    say "Ready after $SECONDS s."
fi
