"""Which checkpoint it is: its folder, fetched where it lies on the Hub, and the fingerprint of what is in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlaflow.errors import CheckpointError


def fingerprint(folder: Path) -> str:
    """Content hash of a checkpoint's config and weights, for provenance."""
    digest = hashlib.sha256()
    for name in ("config.json", "action_spec.json", "stats.json", "model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


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
            f"There is no folder {folder}, and fetching a repository of that name needs: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no folder {folder}, and no repository of that name could be fetched: {error}"
        ) from error
