"""What pretrained vision-language backbones share: language layers run one at a time, text positions after the prefix, files.

The modules are those of transformers; only the order in which they run is ours, so that a prefix can stop at any layer and
other tokens can read its keys and values. What a decoder adds sees the whole prefix and all of itself. transformers is
imported when the first network is built, never before.

A new policy starts from ``source`` (a local folder or a Hub name). The network it gets carries a config with the
``architecture`` written out and no source, and copies of tokenizer and image settings; a checkpoint holds those, so it
opens without the original, without a network connection, and with no other code than vlaflow's and transformers'.

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state, H heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlaflow.backbones.base import Prefix, Rotary
from vlaflow.backbones.language import LanguageBackbone
from vlaflow.backbones.pretrained_prompt import answer_ids, answer_texts
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, CheckpointError, SpecError
from vlaflow.nn.attention import KeyValues, attend
from vlaflow.nn.block import Rotate


class Reader(Protocol):
    """Tokenizer and image settings of a pretrained model."""

    tokenizer: Any

    @property
    def end(self) -> str:
        """The token that ends an assistant turn."""

    def save(self, folder: Path) -> None:
        """Write everything that reading needs, as JSON."""


class PretrainedBackbone(LanguageBackbone):
    """See the module text.

    Attributes:
        network: transformers' model without the language-model head.
        head: that head, or None where it is the embedding table itself.
        state: from the padded state to one token.
        reader: tokenizer and image settings; None for a network built from an architecture alone.
    """

    network: Any
    head: nn.Linear | None
    state: nn.Linear
    reader: Any | None
    name: str
    """For sentences."""

    _rotate: Callable[..., tuple[Tensor, Tensor]]

    @abstractmethod
    def positions(self, position_BT: Tensor) -> Tensor:
        """Text positions as the model's rotary embedding takes them."""

    @staticmethod
    @abstractmethod
    def read_from(folder: Path) -> Any:
        """The reader of what ``Reader.save`` wrote."""

    @property
    def language(self) -> Any:
        """The language model: embedding table, layers, norm, rotary embedding."""
        return self.network.language_model

    # -- layers ------------------------------------------------------------------------------------------------------

    def layer(
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary | None = None,
        kv_cache: KeyValues | None = None,
        padding_mask_BT: Tensor | None = None,
        *,
        mask_TS: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """See the base class; ``rotary`` is required."""
        assert rotary is not None
        if self.config.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._layer, index, hidden_BTW, rotary, kv_cache, padding_mask_BT, mask_TS, use_reentrant=False)
        return self._layer(index, hidden_BTW, rotary, kv_cache, padding_mask_BT, mask_TS)

    def _layer(  # noqa: PLR0917
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary,
        kv_cache: KeyValues | None,
        padding_mask_BT: Tensor | None,
        mask_TS: Tensor | None,
    ) -> tuple[Tensor, KeyValues]:
        block = self.language.layers[index]
        attention, (b, t, _) = block.self_attn, hidden_BTW.shape
        x_BTW = block.input_layernorm(hidden_BTW)
        query_BTHE, key_BTGE, value_BTGE = (
            project(x_BTW).view(b, t, -1, self.spec.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):  # Qwen3's family normalises each head's queries and keys
            query_BTHE, key_BTGE = attention.q_norm(query_BTHE), attention.k_norm(key_BTGE)
        value_BGTE = value_BTGE.transpose(1, 2)
        query_BHTE, key_BGTE = self._rotate(query_BTHE.transpose(1, 2), key_BTGE.transpose(1, 2), *rotary)
        # Under autocast the rotation is float32 and the values are not; the memory keeps one, small, number format.
        own = KeyValues(key_BGTE.to(value_BGTE.dtype), value_BGTE, padding_mask_BT)
        mixed_BHTE = attend(query_BHTE.to(value_BGTE.dtype), own, kv_cache, mask_TS)
        hidden_BTW = hidden_BTW + attention.o_proj(mixed_BHTE.transpose(1, 2).reshape(b, t, -1))
        return hidden_BTW + block.mlp(block.post_attention_layernorm(hidden_BTW)), own

    def place(self, suffix_BTW: Tensor, prefix: Prefix, offset: int = 0) -> tuple[Tensor, Rotary | None]:
        """Text positions that continue each observation's own; draws innermost, as in ``attend``."""
        suffix_BTW = suffix_BTW.to(prefix.hidden_BPW.dtype)
        batch, tokens, _ = suffix_BTW.shape
        return suffix_BTW, self._after(prefix, batch, tokens, offset)

    def rotation(self, prefix: Prefix, batch: int, tokens: int) -> Rotate:
        """See the base class."""
        cosine, sine = self._after(prefix, batch, tokens)
        return lambda query_BHTE, key_BGTE: self._rotate(query_BHTE, key_BGTE, cosine, sine)

    def _after(self, prefix: Prefix, batch: int, tokens: int, offset: int = 0) -> Rotary:
        assert prefix.next_position_B is not None
        first_B = prefix.next_position_B.repeat_interleave(batch // prefix.batch) + prefix.written + offset
        position_BT = first_B[:, None] + torch.arange(tokens, device=first_B.device)
        return self.language.rotary_emb(prefix.hidden_BPW, self.positions(position_BT))

    def finish(self, hidden_BTW: Tensor) -> Tensor:
        """The final RMSNorm."""
        return self.language.norm(hidden_BTW)

    # -- language ----------------------------------------------------------------------------------------------------

    def state_token(self, observation: ObservationBatch, hidden_BPW: Tensor, there_BP: Tensor) -> Tensor:
        """Put the projected state into its place among the embedded tokens.

        Raises:
            SpecError: for a state of another length.
        """
        self.check_state(observation)
        c, device = self.config, hidden_BPW.device
        state_BS = functional.pad(observation.state_BS, (0, c.padded_state - c.state_dim)).to(device, self.state.weight.dtype)
        return hidden_BPW.masked_scatter(there_BP[..., None].to(device), self.state(state_BS).to(hidden_BPW.dtype))

    def check_state(self, observation: ObservationBatch) -> None:
        """Refuse a state of another length.

        Raises:
            SpecError: with both lengths.
        """
        expected, found = self.config.state_dim, observation.state_BS.shape[1]
        if found != expected:
            raise SpecError(f"The policy expects a state of length {expected}, got {found}.")

    @property
    def vocabulary(self) -> int:
        """Ids the published head can name: more than the tokenizer knows, fewer than the table holds (Molmo2)."""
        head = self.language.embed_tokens if self.head is None else self.head
        return head.weight.shape[0]

    @property
    def end_id(self) -> int:
        """The end of an assistant turn."""
        return int(self.answer_ids([""])[0, -1])

    def embed_ids(self, id_BT: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        return self.language.embed_tokens(id_BT)

    def name_ids(self, state_NW: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        if self.head is not None:
            return self.head(state_NW)
        return functional.linear(state_NW, self.language.embed_tokens.weight)

    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Tokens of an assistant turn with its end, (B, T) int64, padded with −100."""
        return answer_ids(self.reading().tokenizer, answers, self.reading().end)

    def answer_texts(self, id_BT: Tensor) -> list[str]:
        """Words up to the end of the turn."""
        return answer_texts(self.reading().tokenizer, id_BT, self.end_id)

    # -- files -------------------------------------------------------------------------------------------------------

    def save_files(self, folder: Path) -> None:
        """Tokenizer, chat template and image settings into ``folder/processor``, all JSON."""
        if self.reader is not None:
            self.reader.save(folder / "processor")

    def load_files(self, folder: Path) -> None:
        """See ``save_files``.

        Raises:
            CheckpointError: when the folder is missing.
        """
        if not (folder / "processor").is_dir():
            raise CheckpointError(f"{folder / 'processor'} is missing (tokenizer and image settings). Copy the whole folder.")
        self.reader = self.read_from(folder / "processor")

    def reading(self) -> Any:
        """The reader.

        Raises:
            CapabilityError: when the network was built from an architecture alone.
        """
        if self.reader is None:
            raise CapabilityError(
                f"This {self.name} network has no tokenizer: it was built from an architecture alone. "
                "Build it with 'source', or open a checkpoint with Policy.from_pretrained."
            )
        return self.reader


def plain_architecture(data: Any) -> Any:
    """transformers' config as JSON data; what depends on the installed version or on the folder is dropped."""
    if isinstance(data, dict):
        return {
            k: plain_architecture(v) for k, v in data.items() if k not in ("transformers_version", "dtype", "architectures")
        }
    return data
