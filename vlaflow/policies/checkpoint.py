"""Where a checkpoint is: its folder, fetched where it lies on the Hub. What it has learned from is in ``provenance``."""

from __future__ import annotations

from pathlib import Path

from vlaflow.errors import CheckpointError
from vlaflow.hub import download, hub_name

PATTERNS = ("*.json", "*.safetensors", "README.md")
REQUIRED = ("**/config.json", "**/model.safetensors")
ROBOT = "robot.json"
"""In the folder of one of a checkpoint's robots; see ``robots``."""
LEROBOT = "vlaflow"
"""In a checkpoint of LeRobot's layout: the folder of vlaflow's own; see ``lerobot``."""


def home_of(folder: Path) -> Path:
    """Where networks, training and card of a checkpoint lie: the folder itself, or the checkpoint of a robot's folder."""
    return folder.parent.parent if (folder / ROBOT).exists() else folder


def local_folder(path: Path | str) -> Path:
    """A checkpoint's folder, fetched from the Hub if ``path`` names a repository (``hub.hub_name``); a robot's is absolute.

    Raises:
        CheckpointError: there is no such folder, or it is a robot's without its checkpoint.
        VlaflowError: see ``hub.hub_name`` and ``hub.download``.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint.")
        name = hub_name(path, "checkpoint")
        if name is None:
            raise CheckpointError(f"There is no checkpoint folder {folder}. Train one: vlaflow train asyncvla.demo --help")
        folder = download(name, "checkpoint", PATTERNS, REQUIRED)[0]
    if (folder / LEROBOT / "config.json").exists():
        return folder / LEROBOT
    if not (folder / ROBOT).exists():
        return folder
    folder = folder.resolve()  # a link or a path such as "." does not say where it lies
    if not (home_of(folder) / "config.json").exists():
        raise CheckpointError(
            f"{folder} is one robot's part of a checkpoint, without the networks. Copy the whole checkpoint, and give its "
            "folder or robots/NAME in it."
        )
    return folder
