"""A training stage's networks and loss without data and weights: what ``vlaflow plan`` counts and measures.

Everything here is called where torch makes tensors without memory, on the meta device or as fake tensors, so that a network of
any size is counted on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn

from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.decoders.base import Decoder, Targets
from vlaflow.decoders.rating import BaseRaterConfig
from vlaflow.flows.consistency import Consistency, Teaching
from vlaflow.nn.meta import on_meta
from vlaflow.policies.base import PolicyConfig

CHUNKS = 256
"""Random chunks that an action tokenizer is fitted on, where none was given."""


@dataclass(frozen=True)
class DryRun:
    """What a training step holds and computes.

    Args:
        networks: everything that is held.
        trained: the part that trains.
        depth: layers of the backbone; 1 where there is none.
        loss: of so many observations, through so many of these layers.
        unseen: numbers that the loss leaves out and a real step keeps for its backward pass, for so many observations.
    """

    networks: nn.Module
    trained: nn.Module
    depth: int
    loss: Callable[[int, int], Tensor]
    unseen: Callable[[int], int]


def acting(config: PolicyConfig, side: int, teach: Callable[[int, int], Teaching] | None = None) -> DryRun:
    """Backbone and decoder learn to act.

    Args:
        config: the assembly; a source is replaced by its architecture, and an action tokenizer fitted on random walks.
        side: of the pictures in pixels.
        teach: what so many observations, through so many layers, are taught by in place of the data.
    """
    model = _without_weights(config).build()
    for part in model.modules():
        if isinstance(part, Decoder):
            part.forget_values()
    exits = None
    if config.exits is not None and config.exits.choose == "all":  # of random exits the deepest needs the most
        exits = config.exits.depths

    def loss(batch: int, depth: int) -> Tensor:
        decoder, codes = config.decoder, config.decoder.latent_codes
        targets = Targets(
            torch.zeros(batch, decoder.chunk_size, decoder.action_dim),
            torch.ones(batch, decoder.chunk_size, dtype=torch.bool),
            torch.zeros(batch, codes.codes, dtype=torch.long) if codes else None,
            teaching=teach and teach(batch, depth),
        )
        prefix = model.read(model.backbone.blank(batch, side), depth)
        reached = None if exits is None else [exit for exit in exits if exit <= depth]
        return model.decoder.loss(prefix, targets, Generator(), reached or None).total

    return DryRun(model, model, model.backbone.spec.depth, loss, lambda batch: model.backbone.vision_numbers(batch, side))


def distilling(config: PolicyConfig, consistency: Consistency, side: int) -> DryRun:
    """A flow learns from a frozen copy of itself, whose layers keep nothing for the backward pass."""
    teacher = _without_weights(config).build()

    def teach(batch: int, depth: int) -> Teaching:
        with torch.no_grad():
            field = teacher.decoder.velocity_field(teacher.read(teacher.backbone.blank(batch, side), depth))
        return partial(consistency.target, teacher=field)

    student = acting(config, side, teach)
    return replace(student, networks=nn.ModuleList((student.networks, teacher)))


def rating(config: PolicyConfig, rater: BaseRaterConfig, side: int, draws: int = 1) -> DryRun:
    """A rater learns from some chunks per observation, on a frozen policy whose layers keep nothing for the backward pass."""
    model = _without_weights(replace(config, rater=rater)).build()
    network = model.rater
    assert network is not None

    def loss(batch: int, depth: int) -> Tensor:
        with torch.no_grad():
            prefix = model.read(model.backbone.blank(batch, side), depth)
            prefix = prefix if draws == 1 else prefix.select(torch.arange(batch).repeat_interleave(draws))
        return network(prefix, torch.zeros(batch * draws, config.decoder.chunk_size, config.decoder.action_dim)).square().mean()

    return DryRun(model, network, model.backbone.spec.depth, loss, lambda batch: 0)


def picturing(config: LatentConfig) -> DryRun:
    """A latent action model learns from pairs of frames."""
    model = LatentActionModel(config, Origin("", "", 1.0, 1.0, 1, 0.0, 0))

    def loss(batch: int, depth: int) -> Tensor:
        frame_BHW3 = torch.zeros(batch, config.image_size, config.image_size, 3, dtype=torch.uint8)
        return model(frame_BHW3, frame_BHW3, model.draw(batch, Generator())).later_BHW3.square().mean()

    return DryRun(model, model, 1, loss, lambda batch: 0)


def unlike(config: PolicyConfig, before: PolicyConfig) -> str | None:
    """The first weight whose shape differs between two assemblies, in words; None where one can start from the other's weights.

    Raters do not count. Nothing is allocated or read but architectures; action tokenizers are fitted on random walks.
    """
    shapes = []
    for each in (_without_weights(config), _without_weights(before)):
        with torch.random.fork_rng(devices=[]), on_meta():
            model = replace(each, rater=None).build()
        shapes.append({name: " x ".join(map(str, weight.shape)) for name, weight in model.state_dict().items()})
    own, theirs = shapes
    found = next((name for name in sorted(own | theirs) if own.get(name) != theirs.get(name)), None)
    return None if found is None else f"{found}: {own.get(found, 'none')}, and {theirs.get(found, 'none')} there"


def random_walks(chunk_size: int, dim: int) -> np.ndarray:
    """Chunks as steady as a robot's, in [−1, 1], float32 (CHUNKS, L, D).

    FAST needs half as many tokens again for white noise.
    """
    step_NLD = np.random.default_rng(0).standard_normal((CHUNKS, chunk_size, dim), np.float32) / chunk_size**0.5
    return np.clip(step_NLD.cumsum(1), -1, 1)


def _without_weights(config: PolicyConfig) -> PolicyConfig:
    decoder = config.decoder
    if decoder.unfitted:
        decoder = decoder.fitted(random_walks(decoder.chunk_size, decoder.action_dim))
    return replace(config, backbone=config.backbone.unread(), decoder=decoder)
