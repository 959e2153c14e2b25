"""What every decoder of discrete action tokens shares: tokenizer, embedding, output head, losses, given tokens, reports.

The output projection has one row per action token and no others, whatever vocabulary the backbone was pretrained on.

Shape letters: B batch (observations × noise samples, samples innermost), S token slots, V vocabulary, W width, L chunk size, D
action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.actions.base import Tokenizer, TokenizerConfig
from vlaflow.backbones.base import Backbone, BackboneSpec, Prefix
from vlaflow.backbones.language import LanguageBackbone, speaking
from vlaflow.decoders.base import Conditioning, Decoder, DecoderConfig, Targets, TokenConditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.categorical import tempered
from vlaflow.flows.sampling import Sampling
from vlaflow.stacks.shared import SharedStack


@dataclass(frozen=True)
class TokenConfig(DecoderConfig):
    """What decoders of action tokens have in common.

    Args:
        action_dim: D.
        tokenizer: a fitted one, or what training is to fit on its demonstrations.
        chunk_size: actions per chunk, L.
        noise_samples: corruptions of one chunk per observation and training step; they share one prefix.
        text_row: id in the backbone's own vocabulary as whose row action token 0 begins, the following tokens as the rows
            before it (UniVLA and UD-VLA on Emu3: 151 642, the last of the text); None begins at random.
        marks: ids in the backbone's own vocabulary of a mark in front of the tokens and of one behind them (UniVLA's boa and
            eoa on Emu3: 151 844 and 151 845): a token that is only read, and the end token, begin as their rows. None: no mark
            in front, unless the decoder needs one.
    """

    action_dim: int
    tokenizer: TokenizerConfig
    chunk_size: int = 16
    noise_samples: int = 1
    text_row: int | None = None
    marks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.action_dim, self.chunk_size, self.noise_samples) < 1:
            raise ConfigError(
                f"action_dim, chunk_size and noise_samples must be at least 1, got {self.action_dim}, {self.chunk_size} and "
                f"{self.noise_samples}."
            )
        fitted = self.tokenizer.fitted
        if fitted is not None and (fitted.chunk_size, fitted.dim) != (self.chunk_size, self.action_dim):
            cure = f"Fit one for this chunk size: vlaflow data fit-tokenizer --chunk-size {self.chunk_size}"
            if fitted.dim != self.action_dim:
                cure = "Leave --tokenizer out to have one fitted on the training data."
            raise ConfigError(
                f"The tokenizer is for chunks of {fitted.chunk_size} actions of {fitted.dim} dimensions, the decoder for "
                f"{self.chunk_size} of {self.action_dim}. {cure}"
            )

    @property
    def unfitted(self) -> bool:
        """Whether there is a tokenizer to be fitted first."""
        return self.tokenizer.fitted is None

    def with_tokenizer(self, tokenizer: TokenizerConfig) -> Self:
        """The config with this one."""
        return replace(self, tokenizer=tokenizer)

    def fitted(self, action_NLD: np.ndarray) -> Self:
        """The config with a fitted tokenizer; one that is fitted already stays.

        Args:
            action_NLD: normalised chunks to fit on.
        """
        return replace(self, tokenizer=self.tokenizer.fit(action_NLD))

    @property
    def ready(self) -> Tokenizer:
        """The fitted tokenizer.

        Raises:
            ConfigError: when it is still to be fitted.
        """
        if (fitted := self.tokenizer.fitted) is not None:
            return fitted
        raise ConfigError("This action tokenizer is not fitted yet. Train with a data set, or see vlaflow data fit-tokenizer.")


@dataclass(frozen=True)
class TokenState:
    """Tokens under way.

    Args:
        id_BS: int64.
        start_BS: the clock each token started from; one that started at 0 never changes.
        probability_BS: what the network gave each token when it last looked; 1 for given ones.
        generators: one per observation; every step draws from them.
        done: solver steps taken.
        sampling: all of them.
        revised: tokens that each step changed, (B,) each.
    """

    id_BS: Tensor
    start_BS: Tensor
    probability_BS: Tensor
    generators: tuple[Generator, ...]
    done: int
    sampling: Sampling
    revised: tuple[Tensor, ...] = ()

    @property
    def free_BS(self) -> Tensor:
        """bool: tokens that may change."""
        return self.start_BS > 0

    def clock_at(self, done: int) -> Tensor:
        """Clocks after ``done`` steps: every token walks from its start to exactly 0."""
        return self.start_BS * self.sampling.clock(done)

    def moved(self: State, id_BS: Tensor, probability_BS: Tensor) -> State:
        """After one more step; tokens that started at clock 0 stay whatever is proposed."""
        id_BS = torch.where(self.free_BS, id_BS, self.id_BS)
        probability_BS = torch.where(self.free_BS, probability_BS, self.probability_BS)
        revised = (*self.revised, (id_BS != self.id_BS).sum(1))
        return replace(self, id_BS=id_BS, probability_BS=probability_BS, done=self.done + 1, revised=revised)


State = TypeVar("State", bound=TokenState)


class TokenDecoder(Decoder[State]):
    """See the module text.

    Attributes:
        tokenizer: the fitted one.
        embedding: rows of the V action tokens, and of ``extra`` tokens that are only ever read.
        front: row of the mark in front of the tokens among these; None for no mark.
        head: hidden states to logits over the V action tokens.
    """

    tokenizer: Tokenizer

    def __init__(self, config: TokenConfig, spec: BackboneSpec, extra: int = 0, *, marked: bool | None = None) -> None:
        super().__init__()
        marked = config.marks is not None if marked is None else marked
        extra += marked
        self.chunk_size, self.action_dim, self.noise_samples = config.chunk_size, config.action_dim, config.noise_samples
        self.tokenizer, self.text_row, self.marks = config.ready, config.text_row, config.marks
        self.front = self.tokenizer.vocabulary + extra - 1 if marked else None
        self.stack = SharedStack(spec.width)
        self.embedding = nn.Embedding(self.tokenizer.vocabulary + extra, spec.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(spec.width, self.tokenizer.vocabulary)
        values_SV = self.tokenizer.values_SV
        self._values_SV = None if values_SV is None else torch.from_numpy(values_SV)

    @torch.no_grad()
    def begin_from(self, backbone: Backbone) -> None:
        """See ``Decoder``: the tables of action tokens as rows of text, for ``text_row``, and of ``marks``.

        Raises:
            CapabilityError: the backbone has no vocabulary.
            ConfigError: there are not as many rows.
        """
        if self.text_row is not None:
            self._begin_as_text(speaking(backbone), self.text_row)
        if self.marks is not None:
            self._begin_as_marks(speaking(backbone), self.marks)

    def _begin_as_text(self, spoken: LanguageBackbone, text_row: int) -> None:
        if not self.vocabulary <= text_row + 1 <= spoken.vocabulary:
            raise ConfigError(
                f"text_row must lie in {self.vocabulary - 1}..{spoken.vocabulary - 1}, for the tokenizer's vocabulary and the "
                f"backbone's, got {text_row}."
            )
        read_VW, named_VW = spoken.rows(text_row - torch.arange(self.vocabulary))
        self.embedding.weight[: self.vocabulary] = read_VW.to(self.embedding.weight.dtype)
        self.head.weight.copy_(named_VW)
        self.head.bias.zero_()

    def _begin_as_marks(self, spoken: LanguageBackbone, marks: tuple[int, int]) -> None:
        if not 0 <= min(marks) <= max(marks) < spoken.vocabulary:
            raise ConfigError(f"marks must lie in 0..{spoken.vocabulary - 1}, the backbone's vocabulary, got {list(marks)}.")
        read_2W, named_2W = spoken.rows(torch.tensor(marks))
        if self.front is not None:
            self.embedding.weight[self.front] = read_2W[0].to(self.embedding.weight.dtype)
        if self.tokenizer.end is not None:
            self.embedding.weight[self.tokenizer.end] = read_2W[1].to(self.embedding.weight.dtype)
            self.head.weight[self.tokenizer.end] = named_2W[1].to(self.head.weight.dtype)

    def behind_mark(self, embedded_BSW: Tensor) -> Tensor:
        """Embedded tokens with the mark in front of them, where there is one: (B, S or 1 + S, W)."""
        if self.front is None:
            return embedded_BSW
        mark_B1W = self.embedding.weight[self.front].to(embedded_BSW.dtype).expand(len(embedded_BSW), 1, -1)
        return torch.cat((mark_B1W, embedded_BSW), 1)

    def without_mark(self, hidden_BTW: Tensor) -> Tensor:
        """Hidden states of the tokens alone, (B, S, W)."""
        return hidden_BTW if self.front is None else hidden_BTW[:, 1:]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.tokenizer.vocabulary

    @property
    def slots(self) -> int:
        """S."""
        return self.tokenizer.slots

    @property
    def suffix_tokens(self) -> int:
        """The tokens, and the mark in front of them."""
        return self.slots + (self.front is not None)

    @property
    def conditioning(self) -> frozenset[Capability]:
        """How a chunk can be conditioned where tokens can be given at all: by tokens, and by actions where each token
        belongs to one action.
        """
        by_action = {Capability.CONDITIONING} if self.tokenizer.local else set()
        return frozenset({Capability.TOKEN_CONDITIONING} | by_action)

    @property
    def drawing(self) -> frozenset[Capability]:
        """How its tokens can be drawn."""
        expected = set() if self._values_SV is None else {Capability.EXPECTED}
        return frozenset({Capability.TEMPERATURE} | expected)

    def weights(self, logits_BSV: Tensor, temperature: float, *, expected: bool, slot: slice = slice(None)) -> Tensor:
        """What tokens are drawn from, float32 (B, S, V): softmax(logits/temperature), or all on the expected token.

        Args:
            logits_BSV: of all slots, or of those in ``slot``.
            temperature: 0 leaves the most probable token alone.
            expected: the token whose value is nearest to the mean value under that distribution gets all the weight.
            slot: which slots the logits are of.
        """
        weight_BSV = tempered(logits_BSV, temperature)
        if not expected:
            return weight_BSV
        assert self._values_SV is not None, "compute policies check Capability.EXPECTED before anything runs"
        value_SV = self._values_SV[slot].to(weight_BSV)
        mean_BS1 = (weight_BSV * value_SV).sum(-1, keepdim=True)
        nearest_BS1 = (value_SV - mean_BS1).abs().argmin(-1, keepdim=True)
        return torch.zeros_like(weight_BSV).scatter_(-1, nearest_BS1, 1.0)

    def nfe(self, sampling: Sampling) -> int:
        """One a step."""
        return sampling.steps

    def prepare(self, targets: Targets) -> Targets:
        """See ``Decoder``: the tokens, so that no device waits for them."""
        return replace(targets, id_BS=self.tokenize(targets.action_BLD))

    def encode(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Ids (B, S) of chunks and float weights (B, S) of their tokens in the loss, on the targets' device.

        A token that belongs to one action counts where that action does. One that speaks of the whole chunk counts where
        any action does: steps past the episode's end are then learned as what they hold, the repeated last action. It does not
        count where an intervention or an outlier leaves out a part of the chunk.

        What a robot's chunk lacks is learned as what it holds, because other tokens see it: 0 in dimensions, and the repeated
        last action in steps.
        """
        valid_BL = targets.valid_BL
        id_BS = self.tokenize(targets.action_BLD) if targets.id_BS is None else targets.id_BS
        if self.tokenizer.local:
            if targets.mask_BLD is not None:
                valid_BL = valid_BL | ~targets.mask_BLD.any(-1)
            return id_BS, valid_BL.repeat_interleave(self.action_dim, 1).float()
        counts_B1 = valid_BL.any(1, keepdim=True)
        if targets.executed is not None:
            counts_B1 &= ~(targets.executed.present_BL & ~valid_BL).any(1, keepdim=True)
        return id_BS, counts_B1.float().expand(-1, self.slots)

    def tokenize(self, action_BLD: Tensor) -> Tensor:
        """Ids (B, S) of chunks."""
        return torch.from_numpy(self.tokenizer.encode(action_BLD.float().cpu().numpy())).to(action_BLD.device)

    def forget_values(self) -> None:
        """See ``Decoder``; the ids of chunks are."""
        self.tokenize = partial(_no_ids, self.slots)  # type: ignore[method-assign]

    def hidden(self, id_BS: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """Hidden states (B, S, W) at each depth of tokens that all see each other."""
        hidden = self.stack.exits(self.behind_mark(self.embedding(id_BS)), prefix, depths)
        return [self.without_mark(hidden_BTW) for hidden_BTW in hidden]

    def look(self, embedded_BTW: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, W) and scores (B, S, V) of embedded tokens, behind their mark, that all see each other."""
        hidden_BSW = self.without_mark(self.stack(embedded_BTW, prefix))
        return hidden_BSW, self.head(hidden_BSW)

    def finish(self, state: State) -> Tensor:
        """The tokens as normalised actions; NaN where the network's scores were no numbers, for every id decodes to a chunk."""
        made = self.tokenizer.decode(state.id_BS.cpu().numpy())
        sound_B = state.probability_BS.isfinite().all(1)
        action_BLD = torch.from_numpy(made.action_BLD).to(state.id_BS.device)
        return torch.where(sound_B[:, None, None], action_BLD, float("nan"))

    def tokens(self, state: State) -> Tokens:
        """See ``Decoder``."""
        made = self.tokenizer.decode(state.id_BS.cpu().numpy())
        nothing_B = state.id_BS.new_zeros(len(state.id_BS))
        return Tokens(
            state.id_BS,
            state.probability_BS,
            torch.from_numpy(made.repaired_B).to(state.id_BS.device),
            torch.stack(state.revised or (nothing_B,), 1),
            (len(state.revised),) * len(state.id_BS),
        )

    def token_conditioning(self, conditioning: Conditioning | TokenConditioning) -> TokenConditioning:
        """Given actions as tokens.

        Raises:
            CapabilityError: when no token belongs to one action.
        """
        if isinstance(conditioning, TokenConditioning):
            return conditioning
        if not self.tokenizer.local or conditioning.guidance is not None:
            raise CapabilityError(
                f"A {type(self).__name__} with a {type(self.tokenizer).__name__} cannot start from given actions: its tokens "
                "describe the chunk as a whole. Train it with bins."
            )
        id_BS, _ = self.encode(Targets(conditioning.action_BLD, torch.ones_like(conditioning.clock_BL, dtype=torch.bool)))
        return TokenConditioning(id_BS, conditioning.clock_BL.repeat_interleave(self.action_dim, 1))


def _no_ids(slots: int, action_BLD: Tensor) -> Tensor:
    return torch.zeros(len(action_BLD), slots, dtype=torch.long)


def cross_entropy(logits_BSV: Tensor, id_BS: Tensor, weight_BS: Tensor) -> Tensor:
    """Mean of −log p(id) over tokens with weight; exactly 0, without a gradient, when there is none."""
    loss_BS = functional.cross_entropy(logits_BSV.float().flatten(0, 1), id_BS.flatten(), reduction="none").view_as(weight_BS)
    # where() before the product: an excluded token that is not finite must touch neither the sum nor the gradient
    return torch.where(weight_BS > 0, loss_BS * weight_BS, 0.0).sum() / weight_BS.sum().clamp(min=1)


def probability_of(logits_BSV: Tensor, id_BS: Tensor) -> Tensor:
    """softmax(logits) at the ids, float32 (B, S)."""
    return logits_BSV.float().softmax(-1).gather(-1, id_BS[..., None])[..., 0]
