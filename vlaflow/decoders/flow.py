"""The flow-matching decoder: one token per action, a clock per token, solver steps of first or second order.

Trained with AsyncVLA's unified masks it serves synchronous generation (all clocks 1) and regeneration (clocks 0 on the
actions to keep) with the same weights; with "synchronous" masks it is the usual π0-style decoder.

Shape letters: B batch, K noise samples, L chunk size, D action dimension, X padded dimension, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.data.batch import moved
from vlaflow.decoders.base import Conditioning, Decoder, DecoderConfig, Guidance, Targets, TokenConditioning
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.exits import ExitHeads, ExitTraining
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows import gaussian, guidance
from vlaflow.flows.consistency import VelocityField
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.resnet import ResidualMLP
from vlaflow.nn.time import clock_embedding
from vlaflow.ranges import Count, Fraction, Number, Positive, Width
from vlaflow.stacks.base import Stack
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.stacks.shared import SharedStack

_SMALLEST = 1e-6
"""Clock below which a token is done."""


@dataclass(frozen=True)
class FlowConfig(DecoderConfig):
    """The flow decoder.

    Args:
        action_dim: D.
        chunk_size: actions per chunk, L.
        padded_dim: dimensions the network sees, zero beyond D (pretrained heads use 32); None for D itself.
        masks: "unified" draws AsyncVLA's Bernoulli(y) masks, "synchronous" noises every token.
        max_action_prefix: training gives the first 0 to this many actions of a chunk clean, a number drawn for every sample,
            so that chunks can continue each other while the robot moves (real-time chunking); 0 for none.
        whole: share of the unified masks, and of the action prefixes, that noise every token after all; 0 is the paper.
        noise_samples: noise, time and mask draws per observation and step, K; they share one prefix.
        shared_times: the K draws of an observation have one training time, and noise and masks of their own.
        times: training times are Beta(time_alpha, 1), or skewed towards noise by a log-normal law (``sample_skewed_time``).
        time_alpha: of the former.
        time_floor: smallest training time.
        expert: a stack of its own for the action tokens; None runs them through the backbone's layers.
        time_token: the clock is a token of its own before the actions, as in iFlyBot's expert, and not mixed into each; all
            tokens then share one clock, so it goes with synchronous masks.
        head_layers: residual layers of the velocity head (A1: 2); None for two linear layers (AsyncVLA).
    """

    action_dim: Width
    chunk_size: Width = 16
    padded_dim: int | None = None
    masks: Literal["unified", "synchronous"] = "unified"
    max_action_prefix: int = 0
    whole: float = 0.0
    noise_samples: Count = 2
    shared_times: bool = False
    times: Literal["beta", "skewed"] = "beta"
    time_alpha: Positive = 1.5
    time_floor: Fraction = 0.001
    expert: ExpertConfig | None = None
    time_token: bool = False
    head_layers: Number | None = None

    def __post_init__(self) -> None:
        if self.padded_dim is not None and self.padded_dim < self.action_dim:
            raise ConfigError(f"padded_dim {self.padded_dim} is smaller than action_dim {self.action_dim}.")
        if not 0 <= self.max_action_prefix < self.chunk_size:
            raise ConfigError(
                f"max_action_prefix must leave actions to make: 0 to {self.chunk_size - 1}, got {self.max_action_prefix}."
            )
        if not 0 <= self.whole <= 1:
            raise ConfigError(f"whole is a share of the draws, in [0, 1], got {self.whole}.")
        if self.time_token and (self.masks == "unified" or self.max_action_prefix or self.expert is None):
            raise ConfigError(
                "A time_token is one clock for all: it needs an expert, masks='synchronous' and max_action_prefix=0."
            )
        if min(self.chunk_size, self.noise_samples) < 1:
            raise ConfigError(
                f"chunk_size and noise_samples must be at least 1, got {self.chunk_size} and {self.noise_samples}."
            )

    def build(self, spec: BackboneSpec) -> FlowDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return FlowDecoder(self, spec)


class ActionCodec(nn.Module):
    """Noisy actions and clocks to tokens, hidden states to velocities.

    Token = MLP([P·x ; S(clock)]) with S the sinusoid of each token's own clock, so a clean token's embedding does not
    depend on the time the others are at (AsyncVLA §3.1). With ``time_token`` S
    passes the MLP alone and is a token before the others. Output head: two linear layers (as EO-1), or a residual network
    with ``head_layers`` layers (A1).
    """

    def __init__(self, dim: int, width: int, head_layers: int | None = None, time_token: bool = False) -> None:
        super().__init__()
        self.width, self.time_token = width, time_token
        self.project = nn.Linear(dim, width)
        self.mix = nn.Sequential(nn.Linear(width if time_token else 2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.head: nn.Module = nn.Sequential(nn.Linear(width, width), nn.Linear(width, dim))
        if head_layers is not None:
            self.head = ResidualMLP(width, width, dim, head_layers)

    def encode(self, x_BLX: Tensor, clock_BL: Tensor) -> Tensor:
        """(B, L, X) and (B, L) → (B, L, W), or (B, 1 + L, W) with a time token."""
        return self.enter(x_BLX, self.times(clock_BL))

    def times(self, clock_BL: Tensor) -> Tensor:
        """What ``enter`` takes of the clocks, whatever the actions: (B, L, W), or (B, 1, W) with a time token."""
        return clock_embedding(clock_BL.amax(1, keepdim=True) if self.time_token else clock_BL, self.width)

    def enter(self, x_BLX: Tensor, time_BTW: Tensor) -> Tensor:
        """Noisy actions and what ``times`` made of their clocks, as tokens."""
        time_BTW = time_BTW.to(x_BLX.dtype)
        if self.time_token:
            return torch.cat((self.mix(time_BTW), self.project(x_BLX)), 1)
        return self.mix(torch.cat((self.project(x_BLX), time_BTW), -1))

    def decode(self, hidden_BLW: Tensor) -> Tensor:
        """(B, L, W), or with a time token (B, 1 + L, W), → velocity (B, L, X)."""
        return self.head(hidden_BLW[:, int(self.time_token) :])


@dataclass(frozen=True)
class FlowState:
    """Tokens under way.

    Args:
        x_BLX: float32, normalised and padded actions at their current clocks.
        start_BL: the clock each token started from.
        done: solver steps taken.
        sampling: all of them.
        guidance: padded actions to be bent towards.
    """

    x_BLX: Tensor
    start_BL: Tensor
    done: int
    sampling: Sampling
    guidance: Guidance | None = None

    def clock_at(self, done: int) -> Tensor:
        """Clocks after ``done`` steps: every token walks from its start to exactly 0."""
        return self.start_BL * self.sampling.clock(done)


class FlowDecoder(Decoder[FlowState]):
    """See the module text.

    Attributes:
        DRAWS: number of tensors that ``draw`` makes.
    """

    DRAWS: ClassVar[int] = 4

    def __init__(self, config: FlowConfig, spec: BackboneSpec) -> None:
        super().__init__()
        self.config = config
        self.chunk_size, self.action_dim = config.chunk_size, config.action_dim
        self.stack: Stack = (
            config.expert.build(spec, config.chunk_size, config.time_token) if config.expert else SharedStack(spec.width)
        )
        self.codec = ActionCodec(
            config.padded_dim or config.action_dim, self.stack.width, config.head_layers, config.time_token
        )
        self.exits = ExitTraining((spec.depth,))
        self.exit_heads: ExitHeads | None = None

    def learn_exits(self, exits: ExitTraining) -> None:
        """See ``Decoder``."""
        self.exits, width = exits, self.stack.width
        if exits.own_heads:
            self.exit_heads = ExitHeads(exits, width, width, self.config.padded_dim or self.action_dim)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Regeneration only after training with mixed clocks."""
        trained = {Capability.REGENERATION} if self.config.masks == "unified" else set()
        return frozenset({Capability.CONDITIONING, Capability.CONTINUOUS, Capability.GRID} | trained)

    @property
    def max_action_prefix(self) -> int:
        """As trained; with mixed clocks, or by guidance, any number that leaves actions to make."""
        return self.config.max_action_prefix or self.chunk_size - 1

    @property
    def suffix_tokens(self) -> int:
        """One per action, unless an expert has layers for them."""
        return 0 if self.stack.own_layers else self.chunk_size

    def nfe(self, sampling: Sampling) -> int:
        """One a step, or two to second order."""
        return sampling.evaluations

    def velocity(self, x_BLX: Tensor, clock_BL: Tensor, prefix: Prefix, time_BTW: Tensor | None = None) -> Tensor:
        """Predicted dx/dt (B, L, X) of tokens at their clocks; ``time_BTW`` is ``ActionCodec.times`` of these, where known.

        Padding dimensions are 0 in every action and take no part in the loss; so are dimensions and steps that a chunk of the
        observation's robot does not have. Their velocity is known, x/t, and keeps them what training showed: t·noise.
        """
        codec = self.codec
        token_BTW = codec.encode(x_BLX, clock_BL) if time_BTW is None else codec.enter(x_BLX, time_BTW)
        made_BLX = self.answer(self.stack(token_BTW, prefix), prefix.depth)
        mask_BLX = self._mask(prefix.action_mask_BLD, x_BLX)
        return made_BLX if mask_BLX is None else torch.where(mask_BLX, made_BLX.float(), noise_velocity(x_BLX, clock_BL))

    def answer(self, hidden_BTW: Tensor, depth: int) -> Tensor:
        """Velocity (B, L, X) that the head of a depth makes of the stack's hidden states."""
        if self.exit_heads is None or depth not in self.exit_heads:
            return self.codec.decode(hidden_BTW)
        return self.exit_heads(hidden_BTW[:, int(self.config.time_token) :], depth)

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Of K noise samples each: 1 where a token is noised, 1 after the action prefix, clocks, all (B·K, L); the noise."""
        c, b = self.config, batch * self.config.noise_samples
        mask_BL, free_BL = torch.ones(b, c.chunk_size), torch.ones(b, c.chunk_size)
        if c.masks == "unified":
            mask_BL = gaussian.sample_mask(b, c.chunk_size, generator, c.whole)
        if c.max_action_prefix:
            free_BL = gaussian.sample_beginning(b, c.chunk_size, c.max_action_prefix, generator, c.whole)
            mask_BL = mask_BL * free_BL
        times = (batch if c.shared_times else b, 1)
        if c.times == "beta":
            time_B1 = gaussian.sample_time(times, generator, c.time_alpha, c.time_floor)
        else:
            time_B1 = gaussian.sample_skewed_time(times, generator)
        time_B1 = time_B1.repeat_interleave(b // times[0], 0)
        noise_BLX = torch.randn((b, c.chunk_size, c.padded_dim or c.action_dim), generator=generator)
        return mask_BL, free_BL, time_B1 * mask_BL, noise_BLX

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Mean squared velocity error over masked, valid tokens and real dimensions (AsyncVLA Alg. 2), K samples a prefix."""
        c, (mask_BL, free_BL, clock_BL, noise_BLX) = self.config, draws
        mask_BLD = None if targets.mask_BLD is None else targets.mask_BLD.repeat_interleave(c.noise_samples, 0)
        action_BLX = self._pad(_without_padding(targets.action_BLD.float(), targets.mask_BLD))
        action_BLX = action_BLX.repeat_interleave(c.noise_samples, 0)
        valid_BL = targets.valid_BL.repeat_interleave(c.noise_samples, 0)
        known_BLX = action_BLX
        if c.max_action_prefix and targets.executed is not None:  # what a robot commits to is what it executes
            executed = targets.executed.repeat(c.noise_samples)
            executed_BLX = self._pad(_without_padding(executed.action_BLD.float(), mask_BLD))
            known_BLX = torch.where(free_BL[..., None] > 0, action_BLX, executed_BLX)
            valid_BL = executed.valid_after((1 - free_BL).sum(1, keepdim=True))
        x_BLX = gaussian.interpolate(known_BLX, noise_BLX, clock_BL)
        target_BLX = gaussian.velocity_target(action_BLX, noise_BLX)
        if targets.teaching is not None:
            target_BLX = targets.teaching(x_BLX, clock_BL, self.velocity_field(prefix.detach()))
        token_BLW = self.codec.encode(x_BLX, clock_BL)

        def loss(made_BLX: Tensor, target_BLX: Tensor) -> Tensor:
            error_BLX = made_BLX.float() - target_BLX
            return gaussian.masked_mean_square(error_BLX[..., : c.action_dim], mask_BL * valid_BL, mask_BLD)

        depths = depths or (prefix.depth,)
        hidden = self.stack.exits(token_BLW, prefix, depths)
        losses = self.exits.losses(hidden, depths, self.answer, loss, target_BLX, training=self.training)
        return mean_over_exits("velocity", losses)

    def velocity_field(self, prefix: Prefix) -> VelocityField:
        """See ``Decoder``."""
        return partial(self._velocity, prefix, None)

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> FlowState:
        """Noise where nothing is given; given actions enter at the point of the path that belongs to their clock.

        Raises:
            CapabilityError: when tokens of a vocabulary are given.
        """
        if isinstance(conditioning, TokenConditioning):
            raise CapabilityError("A flow decoder has no vocabulary; give it actions.")
        c, device = self.config, prefix.hidden_BPW.device
        shape = (c.chunk_size, c.padded_dim or c.action_dim)
        noise_BLX = moved(gaussian.standard_normal(generators, shape, sampling.noise_scale), device, non_blocking=True)
        if conditioning is None:
            return FlowState(noise_BLX, torch.ones(noise_BLX.shape[:2], device=device), 0, sampling)
        x_BLX = self._pad(conditioning.action_BLD.float())
        if not conditioning.noised:
            x_BLX = gaussian.interpolate(x_BLX, noise_BLX, conditioning.clock_BL)
        elif (mask_BLX := self._mask(prefix.action_mask_BLD, x_BLX)) is not None:  # what is no action is noise at any clock
            x_BLX = torch.where(mask_BLX, x_BLX, conditioning.clock_BL[..., None] * noise_BLX)
        guide = conditioning.guidance and replace(
            conditioning.guidance, action_BLD=self._pad(conditioning.guidance.action_BLD.float())
        )
        return FlowState(x_BLX, conditioning.clock_BL, 0, sampling, guide)

    def continued(self, action_BLD: Tensor, known_B: Tensor, committed_B: Tensor, *, guided: bool = False) -> Conditioning:
        """See ``Decoder``; trained with action prefixes or mixed clocks it is given them, otherwise bent towards them."""
        if not guided and (self.config.max_action_prefix or Capability.REGENERATION in self.capabilities):
            return super().continued(action_BLD, known_B, committed_B)
        guide = Guidance(action_BLD, guidance.soft_mask(self.chunk_size, committed_B, known_B))
        return Conditioning(torch.zeros_like(action_BLD), torch.ones_like(guide.weight_BL), guidance=guide)

    def advance(self, state: FlowState, prefix: Prefix, steps: int = 1) -> FlowState:
        """Solver steps; the integration stays in float32 whatever the network computes in."""
        velocity, count = partial(self._velocity, prefix, state.guidance), state.sampling.steps
        for done in range(state.done, min(state.done + steps, count)):
            now_BL, next_BL = state.clock_at(done), state.clock_at(done + 1)
            x_BLX = gaussian.solver_step(state.sampling.solver, state.x_BLX, velocity, now_BL, next_BL, last=done + 1 == count)
            state = replace(state, x_BLX=x_BLX, done=done + 1)
        return state

    def finish(self, state: FlowState) -> Tensor:
        """The real dimensions."""
        return state.x_BLX[..., : self.action_dim]

    def _velocity(self, prefix: Prefix, guide: Guidance | None, x_BLX: Tensor, clock_BL: Tensor) -> Tensor:
        """The velocity in float32, bent where there is something to be bent towards."""
        if guide is None:
            return self.velocity(x_BLX, clock_BL, prefix).float()
        with torch.enable_grad():
            x_BLX = x_BLX.detach().requires_grad_()
            velocity_BLX = self.velocity(x_BLX, clock_BL, prefix).float()
            bent_BLX = guidance.guided(x_BLX, velocity_BLX, clock_BL, guide.action_BLD, guide.weight_BL)
        return torch.cat((bent_BLX[..., : self.action_dim], velocity_BLX.detach()[..., self.action_dim :]), -1)

    def _pad(self, action_BLD: Tensor) -> Tensor:
        extra = (self.config.padded_dim or self.action_dim) - action_BLD.shape[-1]
        return functional.pad(action_BLD, (0, extra)) if extra else action_BLD

    def _mask(self, action_mask_BLD: Tensor | None, like_BLX: Tensor) -> Tensor | None:
        """bool (B, L, X), False on padding; None where there is none. Noise samples are innermost in the batch."""
        extra = like_BLX.shape[-1] - self.action_dim
        if action_mask_BLD is not None:
            return functional.pad(action_mask_BLD, (0, extra)).repeat_interleave(len(like_BLX) // len(action_mask_BLD), 0)
        return torch.arange(like_BLX.shape[-1], device=like_BLX.device) < self.action_dim if extra else None


def noise_velocity(x_BLX: Tensor, clock_BL: Tensor) -> Tensor:
    """dx/dt of what is no action, x/t: it stays noise times clock."""
    return x_BLX / clock_BL[..., None].clamp(min=_SMALLEST)


def _without_padding(action_BLD: Tensor, mask_BLD: Tensor | None) -> Tensor:
    """The actions, 0 in dimensions and steps that their robots lack."""
    return action_BLD if mask_BLD is None else torch.where(mask_BLD, action_BLD, 0.0)
