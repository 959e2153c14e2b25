"""Action tokenizers as JSON files: ``vlaflow data fit-tokenizer`` writes them, training reads them.

A checkpoint contains its tokenizer in its config.json and needs no such file.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlaflow import __version__
from vlaflow.actions.base import Tokenizer, TokenizerConfig
from vlaflow.actions.published_fast import PublishedFast
from vlaflow.config import from_versioned, to_json
from vlaflow.errors import ConfigError
from vlaflow.outputs import write_json
from vlaflow.strict import read_json


@dataclass(frozen=True)
class TokenizerFile:
    """A fitted tokenizer and the data it was fitted on.

    Args:
        tokenizer: tokenizer of normalised chunks.
        normalisation: mode of the normaliser of these chunks.
        dataset: fingerprint of the data set.
        action_clip, kept_actions: as in the config of a policy that is trained with it.
        vlaflow: version that wrote the file.
    """

    tokenizer: Tokenizer
    normalisation: str
    dataset: str
    action_clip: float | None = None
    kept_actions: tuple[str, ...] = ()
    vlaflow: str = __version__

    def require(self, file: Path | str, normalisation: str, clip: float | None, kept: Sequence[str]) -> None:
        """Refuse to encode actions of another normalisation.

        Raises:
            ConfigError: with the options to fit it again with.
        """
        own, asked = (self.normalisation, self.action_clip, self.kept_actions), (normalisation, clip, tuple(kept))
        if own != asked:
            options = f"--normalisation {normalisation}"
            options += "" if clip is None else f" --action-clip {clip:g}"
            options += f" --kept-actions {shlex.join(kept)}" if kept else ""
            raise ConfigError(
                f"{file} was fitted on actions normalised by {_words(*own)}, but this policy uses {_words(*asked)}. "
                f"Fit it again: vlaflow data fit-tokenizer {options} --out {file} DATASET"
            )


def save_tokenizer(file: Path, content: TokenizerFile) -> None:
    """Write a tokenizer file, whole or not at all."""
    write_json(file, to_json(content), indent=1)


def open_tokenizer(file: Path) -> TokenizerFile:
    """Read what ``save_tokenizer`` wrote.

    Raises:
        ConfigError: for a missing or damaged file.
    """
    if not file.is_file():
        raise ConfigError(f"There is no tokenizer file {file}. Fit one: vlaflow data fit-tokenizer DATASET --out {file}")
    return from_versioned(TokenizerFile, read_json(file, ConfigError, "fit it again: vlaflow data fit-tokenizer."), str(file))


def load_tokenizer(file: Path, normalisation: str, clip: float | None = None, kept: Sequence[str] = ()) -> Tokenizer:
    """Load a tokenizer for actions with this normalisation, as ``TokenizerFile`` names its parts.

    Raises:
        ConfigError: a missing or damaged file, or a tokenizer for another normalisation.
    """
    found = open_tokenizer(file)
    found.require(file, normalisation, clip, kept)
    return found.tokenizer


def named_tokenizer(name: Path | str) -> TokenizerConfig:
    """What ``--tokenizer`` names: a file of ours (.json), or the folder or Hub name of a published FAST tokenizer.

    Raises:
        ConfigError: a missing or damaged file.
    """
    return open_tokenizer(Path(name)).tokenizer if _is_ours(name) else PublishedFast(str(name))


def require_normalisation(name: Path | str, normalisation: str, clip: float | None, kept: Sequence[str]) -> None:
    """Refuse a tokenizer file for actions of another normalisation; published ones do not say for which they are.

    Raises:
        ConfigError: it is one.
    """
    if _is_ours(name):
        open_tokenizer(Path(name)).require(name, normalisation, clip, kept)


def _words(normalisation: str, clip: float | None, kept: Sequence[str]) -> str:
    limits = [] if clip is None else [f"action_clip {clip:g}"]
    limits += [f"kept_actions {', '.join(kept)}"] if kept else []
    return f"'{normalisation}'" + (f" with {' and '.join(limits)}" if limits else "")


def _is_ours(name: Path | str) -> bool:
    return Path(name).is_file() or Path(name).suffix == ".json"
