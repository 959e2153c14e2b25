"""A saved latent action model that is opened only when it has to encode something.

    model = StoredLatentModel.open("runs/iflybot/latent")
    model.fingerprint()                                        # from the files, without a network
    id_BK = model.codes(earlier_BHW3, later_BHW3)              # opens the network, on the GPU where there is one

Codes of a data set are kept once they are computed (``policies.iflybot.codes``), so most runs never open it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlaflow.actions.latent import LatentActionModel, LatentConfig, LatentFile, Origin, latent_fingerprint
from vlaflow.config import from_versioned
from vlaflow.io import read_json, read_weights


class CodeModel(Protocol):
    """What names the latent actions of frame pairs: an open model, or a stored one."""

    @property
    def config(self) -> LatentConfig:
        """Of the networks."""

    @property
    def origin(self) -> Origin:
        """What it was trained on."""

    def fingerprint(self) -> str:
        """Two models with the same one give the same codes."""

    def codes(self, earlier_BHW3: Tensor, later_BHW3: Tensor) -> Tensor:
        """See ``LatentActionModel.codes``."""


class StoredLatentModel:
    """See the module text.

    Args:
        folder: of the checkpoint.
        config, origin: from its config.json.
    """

    def __init__(self, folder: Path, config: LatentConfig, origin: Origin) -> None:
        self.folder, self.config, self.origin = folder, config, origin

    @staticmethod
    def open(folder: Path | str) -> StoredLatentModel:
        """Read the config, not the weights.

        Raises:
            CheckpointError: for a missing or damaged config.json.
            ConfigError: a config.json of something else, such as a policy.
        """
        file = Path(folder) / "config.json"
        found = from_versioned(LatentFile, read_json(file), str(file))
        return StoredLatentModel(Path(folder), found.model, found.origin)

    def fingerprint(self) -> str:
        """That of the open model."""
        return self._fingerprint

    def codes(self, earlier_BHW3: Tensor, later_BHW3: Tensor) -> Tensor:
        """See ``LatentActionModel.codes``."""
        return self._network.codes(earlier_BHW3, later_BHW3)

    @cached_property
    def _fingerprint(self) -> str:
        return latent_fingerprint(self.config, self.origin, read_weights(self.folder / "model.safetensors"))

    @cached_property
    def _network(self) -> LatentActionModel:
        return LatentActionModel.from_pretrained(self.folder, "cuda" if torch.cuda.is_available() else "cpu")
