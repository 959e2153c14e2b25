"""LeRobot's policy interface on top of vlaflow's ``Policy``."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Generator, Tensor

from lerobot_policy_vlaflow.configuration_vlaflow import (
    VlaflowA1Config,
    VlaflowAnyConfig,
    VlaflowAsyncVLAConfig,
    VlaflowConfig,
    VlaflowDfmVLAConfig,
    VlaflowIflybotConfig,
)
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError
from vlaflow.policies import lerobot
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.recipe import DataSpec
from vlaflow.training.optim import freeze, parameter_groups


class VlaflowPolicy(PreTrainedPolicy):
    """A policy that trains on LeRobot's batches and acts in its loops.

    Args:
        config: see ``VlaflowConfig``.
        dataset_meta: of the data set that a new policy is made for.
        opened: an existing policy, for ``from_pretrained``.
    """

    config_class = VlaflowConfig
    name = "vlaflow"

    def __init__(
        self, config: VlaflowConfig, *, dataset_meta: Any = None, opened: Policy | None = None, dataset_stats: Any = None
    ) -> None:
        super().__init__(config)
        del dataset_stats  # vlaflow measures the training episodes alone
        self.policy = opened or _made(config, dataset_meta)
        self.model = self.policy.model
        self.keys = lerobot.Keys.of(self.policy, config.views)
        config.views = dict(self.keys.views)
        config.chunk_size, config.n_action_steps = self.policy.chunk_size, config.n_action_steps or self.policy.n_action_steps
        self._compute = None if config.compute is None else _parsed(config.compute, self.policy)
        self._queue: deque[Tensor] = deque()
        self._chunks = 0

    def get_optim_params(self) -> list[dict[str, Any]]:
        """The parameters in groups, as the recipe's optimiser takes them; those that the recipe freezes stay as they are."""
        optim = self.config.training().optim
        freeze(self.model, optim)
        return parameter_groups(self.model, optim)

    def reset(self) -> None:
        """A new episode begins: nothing of the last one is kept."""
        self._queue.clear()
        self._chunks = 0

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Training loss; its noise is drawn from torch's global generator, which LeRobot saves and restores."""
        if reduction != "mean":
            raise ConfigError(f"vlaflow's policies know the reduction 'mean' alone, not '{reduction}'.")
        noise, shared = (Generator().manual_seed(int(torch.randint(2**62, ()))) for _ in range(2))
        prepared = self.policy.prepare(self.policy.own_batch(self.keys.batch(batch, self.policy.stats["state"].dim)))
        terms = self.policy.loss(prepared.to(self.policy.device), noise, shared)
        return terms.total, {name: float(value) for name, value in terms.parts.items()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], inference_delay: int | None = None, prev_chunk_left_over: Tensor | None = None, **_: Any
    ) -> Tensor:
        """A chunk (B, L, D) in robot units; with ``prev_chunk_left_over`` it continues that chunk (real-time chunking)."""
        self.eval()
        chunk_BLD = lerobot.act(
            self.policy,
            self.keys.observation(batch, self.policy.stats["state"].dim),
            self._compute,
            seed=self.config.noise_seed,
            number=self._chunks,
            committed=prev_chunk_left_over,
            delay=inference_delay or 0,
        )
        self._chunks += 1
        return chunk_BLD.to(self.policy.device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action (B, D); a chunk is made when the last one is used up."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    def supports_rtc(self) -> bool:
        """Whether its decoder can continue a chunk."""
        return self.policy.model.decoder.max_action_prefix > 0

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)
        weights = None if state_dict is None else {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.policy.save_pretrained(save_directory / lerobot.LEROBOT, weights)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: VlaflowConfig | None = None,
        revision: str | None = None,
        **given: Any,
    ) -> Self:
        """Open a checkpoint of LeRobot's layout, from a folder or the Hub."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        if config is None:
            config = VlaflowConfig.from_pretrained(folder)
        policy = cls(config, opened=Policy.from_pretrained(folder, str(config.device)))
        policy.eval()
        return policy


def _made(config: VlaflowConfig, dataset_meta: Any) -> Policy:
    if dataset_meta is None:
        raise ConfigError("A new policy needs a data set; give --policy.path a checkpoint, or train one.")
    root = Path(dataset_meta.root)
    train = config.train_config(DataSpec.of(root))
    if train.objective.names_codes:
        raise ConfigError(
            f"'{config.recipe}' learns latent action codes, which LeRobot's batches do not have. Train it with vlaflow train, "
            "then: vlaflow export lerobot CKPT --out DIR"
        )
    dataset: Dataset = train.objective.open(root)
    config.views = config.views or dict(dataset.views)
    return train.objective.create(train, dataset)


def _parsed(compute: str, policy: Policy) -> Any:
    home = None if policy.folder is None else Checkpoint(policy.folder, fingerprint(policy.folder))
    return parse(compute, Knobs(), home)


class VlaflowAnyPolicy(VlaflowPolicy):
    """A policy of any system."""

    config_class, name = VlaflowAnyConfig, "vlaflow_policy"


class VlaflowAsyncVLAPolicy(VlaflowPolicy):
    """AsyncVLA."""

    config_class, name = VlaflowAsyncVLAConfig, "vlaflow_asyncvla"


class VlaflowA1Policy(VlaflowPolicy):
    """A1."""

    config_class, name = VlaflowA1Config, "vlaflow_a1"


class VlaflowDfmVLAPolicy(VlaflowPolicy):
    """DFM-VLA."""

    config_class, name = VlaflowDfmVLAConfig, "vlaflow_dfm_vla"


class VlaflowIflybotPolicy(VlaflowPolicy):
    """iFlyBot-VLA."""

    config_class, name = VlaflowIflybotConfig, "vlaflow_iflybot"
