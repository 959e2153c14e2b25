"""Where a checkpoint is: its folder, fetched where it lies on the Hub. What it has learned from is in ``provenance``."""

from __future__ import annotations

from pathlib import Path

from vlaflow.errors import CheckpointError


def local_folder(path: Path | str) -> Path:
    """A checkpoint folder, fetched from the Hugging Face Hub where ``path`` is a repository id and no folder."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise CheckpointError(f"There is no checkpoint folder {folder}. Train one: vlaflow train asyncvla.demo --help")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"There is no folder {folder}, and fetching a repository of that name needs: pip install 'vlaflow[hub]'"
        ) from error
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no folder {folder}, and no repository of that name could be fetched: {error}"
        ) from error
