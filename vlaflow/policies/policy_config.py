"""What a policy's networks are built from; the policy itself is in ``base``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from vlaflow.backbones.base import BackboneConfig
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Mode, Normalizer
from vlaflow.decoders.base import DecoderConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.model import Model
from vlaflow.decoders.rating import BaseRaterConfig
from vlaflow.errors import ConfigError, SpecError
from vlaflow.io import load_weights, require_undamaged
from vlaflow.nn.meta import require_fits
from vlaflow.nn.stored import is_sent, is_shared_later, lay, require_same, stored_in, without_memory
from vlaflow.ranges import require_words
from vlaflow.spec import ActionSpec

Same = Literal["same"]


@dataclass(frozen=True)
class Normalisation:
    """How the numbers of one of several robots are normalised; "same" is as the policy's config says for all.

    Args:
        state_normalisation, action_normalisation, state_clip, action_clip, kept_actions: as in ``PolicyConfig``.
    """

    state_normalisation: Mode | Same = "same"
    action_normalisation: Mode | Same = "same"
    state_clip: float | Same | None = "same"
    action_clip: float | Same | None = "same"
    kept_actions: tuple[str, ...] | Same = "same"


@dataclass(frozen=True)
class PolicyConfig:
    """All that is needed to build a policy's networks.

    Args:
        system: the system this assembly follows, e.g. "asyncvla".
        backbone, decoder, rater: configs of the parts, vlaflow's or another package's; no rater until one is trained.
        state_normalisation, action_normalisation: modes of the normalisers.
        state_clip, action_clip: largest size of a normalised number, beyond which it is clipped; None for no limit.
        kept_actions: words; action dimensions with one of them in their name are left as they are.
        exits: depths at which the decoder also learns to answer; None for the full depth alone.
        n_action_steps: actions executed per chunk unless the caller says otherwise.
    """

    system: str
    backbone: BackboneConfig
    decoder: DecoderConfig
    rater: BaseRaterConfig | None = None
    exits: ExitTraining | None = None
    state_normalisation: Mode = "mean_std"
    action_normalisation: Mode = "mean_std"
    state_clip: float | None = None
    action_clip: float | None = None
    kept_actions: tuple[str, ...] = ()
    n_action_steps: int = 8

    def __post_init__(self) -> None:
        require_words(self)
        if not 1 <= self.n_action_steps <= self.decoder.chunk_size:
            raise ConfigError(
                f"n_action_steps must lie in 1..{self.decoder.chunk_size} (the chunk size), got {self.n_action_steps}."
            )

    def require_continues(self, before: PolicyConfig, where: str, stage: str = "") -> None:
        """Refuse a config in which another policy's weights would mean something else.

        Args:
            before: config of the policy that is continued.
            where: it is, as in "but {where} was trained with".
            stage: of a pipeline and a dot, before the keys that a message names.

        Raises:
            ConfigError: for another normalisation, or chunks of another length.
        """
        for key in ("state_normalisation", "action_normalisation", "state_clip", "action_clip", "kept_actions"):
            ours, theirs = getattr(self, key), getattr(before, key)
            if ours != theirs:
                raise ConfigError(
                    f"{stage}policy.{key} is {ours!r}, but {where} was trained with {theirs!r}, which its weights take for "
                    "granted. Leave out the --set that changes it."
                )
        if self.decoder.chunk_size != before.decoder.chunk_size:
            raise ConfigError(
                f"{stage}policy.decoder makes chunks of {self.decoder.chunk_size} actions, but {where} was trained with "
                f"{before.decoder.chunk_size}, and its chunks keep their length. Leave out the --set that changes it."
            )

    def require_actions(self, widest: int, *, padded: bool) -> None:
        """Refuse actions that the decoder cannot make.

        Args:
            widest: dimensions of the actions, of the robot that has most.
            padded: whether fewer dimensions than the decoder's are padded, as those of several robots are.

        Raises:
            SpecError: for another number of dimensions.
        """
        made = self.decoder.action_dim
        if widest > made or (widest < made and not padded):
            raise SpecError(
                f"The decoder makes {made} action dimensions, the action spec names {widest}. "
                "Set decoder.action_dim to the data set's."
            )

    def normalised_as(self, own: Normalisation) -> PolicyConfig:
        """The same assembly with the normalisation of one of its robots."""
        stated = {f.name: getattr(own, f.name) for f in fields(own)}
        return replace(self, **{name: value for name, value in stated.items() if value != "same"})

    def state_normalizer(self, stats: Mapping[str, FeatureStats]) -> Normalizer:
        """Of a robot's state, by the statistics of its data."""
        return Normalizer.from_stats(stats["state"], self.state_normalisation).limited(self.state_clip)

    def action_normalizer(self, stats: Mapping[str, FeatureStats], action_spec: ActionSpec) -> Normalizer:
        """Of a robot's actions, by the statistics of its data."""
        names = [dimension.name for dimension in action_spec.dimensions]
        limits = self.action_clip, self.kept_actions
        return Normalizer.of_actions(stats["action"], names, self.action_normalisation, *limits)

    def build(self) -> Model:
        """The networks, initialised from torch's global generator; use ``Policy.create`` for a seeded policy."""
        backbone = self.backbone.build()
        depth = backbone.spec.depth
        if self.exits is not None and self.exits.depths[-1] != depth:
            raise ConfigError(
                f"The last of the exits {list(self.exits.depths)} must be the backbone's depth, {depth}. Change exits.depths "
                "with it, or set exits=none."
            )
        decoder = self.decoder.build(backbone.spec)
        decoder.begin_from(backbone)
        if self.exits is not None:
            decoder.learn_exits(self.exits)
        rater = self.rater.build(backbone.spec, self.decoder.action_dim, self.decoder.chunk_size) if self.rater else None
        return Model(backbone, decoder, rater, self.exits.depths if self.exits else ())

    def require_positions(self, tokens: int) -> None:
        """Refuse chunks of so many tokens behind an observation's, where the backbone has no positions for them.

        Raises:
            ConfigError: naming the key that raises their number.
        """
        limit = self.backbone.longest_suffix
        if limit is not None and tokens > limit.size:
            raise ConfigError(
                f"The decoder adds {tokens} tokens to the observation's for its chunks of {self.decoder.chunk_size} actions, "
                f"and the backbone has {limit.size} positions for them. For a new policy: "
                f"--set policy.backbone.{limit.key}={tokens}, or shorter chunks."
            )

    def opened(self, file: Path, device: str) -> Model:
        """The networks with a checkpoint's weights, which are read later where processes are going to share them.

        Args:
            file: ``model.safetensors``.
            device: where the networks run; not looked at where they are read later.

        Raises:
            CheckpointError: the file is missing or damaged, or does not fit the config.
        """
        later = is_shared_later()
        if not later:
            require_fits(self.build, file)
        with torch.random.fork_rng(devices=[]), without_memory() if later else nullcontext():
            model = self.build()
        if later:
            places = stored_in([file])
            require_same(model, places, file)
            if not is_sent():
                require_undamaged(file)
            lay(model, places)
            return model
        load_weights(model, file)
        return model.to(device)
