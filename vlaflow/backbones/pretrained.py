"""What pretrained vision-language backbones share: language layers run one at a time, text positions after the prefix, files.

The modules are those of transformers; only the order in which they run is ours, so that a prefix can stop at any layer and
other tokens can read its keys and values. What a decoder adds sees the whole prefix and all of itself. transformers is
imported when the first network is built, never before, and of its models only the one that is built.

A new policy starts from ``source`` (a local folder or a Hub name). The network it gets carries a config with the
``architecture`` written out and no source, and the processor copies tokenizer and image settings into checkpoints; so one
opens without the original, without a network connection, and with no other code than vlaflow's and transformers'.

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state, H heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlaflow.backbones.base import BackboneConfig, BackboneSpec, Prefix, Rotary
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.language import LanguageBackbone
from vlaflow.backbones.opening import open_network
from vlaflow.backbones.pretrained_processor import PretrainedProcessor, open_pretrained, transformers_library
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import KeyValues, attend
from vlaflow.nn.block import Rotate
from vlaflow.nn.stored import rows_of

WORDS = 50
"""Tokens of a prompt besides its pictures' that ``blank`` assumes: turns, instruction, state."""
PATCHES = 4
"""Patches of a picture that become one token in each of the families here."""


@dataclass(frozen=True)
class PretrainedConfig(BackboneConfig):
    """What the configs of all pretrained backbones hold.

    Args:
        state_dim: length of the proprioceptive state, S.
        views: camera views, any number, in the order of their tokens.
        source: local folder or Hub name of a pretrained model to start from; None when ``architecture`` is given.
        architecture: transformers' configs as JSON data, for random weights or those of a checkpoint.
        dtype: of the pretrained parts. Train in float32 under bf16 autocast; bfloat16 halves the memory of serving.
        recompute: forget activations in training and compute them again, layer by layer (less memory, a third more time).
    """

    state_dim: int
    views: tuple[str, ...]
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None, repr=False)
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    name: ClassVar[str]
    """For sentences."""
    family: ClassVar[str]
    """transformers' module, as in ``transformers.models``."""
    model_class: ClassVar[str]
    """transformers' class of the model with its language-model head."""
    published: ClassVar[Mapping[str, Callable[[], dict[str, Any]]]] = {}
    """Architectures that are known without reading anything, by source."""
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    """transformers' class that builds such a model from a config."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.architecture is None):
            raise ConfigError(f"The {self.name} backbone needs either 'source' (a folder or Hub name) or 'architecture'.")
        if len(set(self.views)) != len(self.views):
            raise ConfigError(f"Camera views must differ, got {list(self.views)}.")
        if self.state_width and self.state_dim > self.state_width:
            raise ConfigError(f"padded_state {self.state_width} is smaller than state_dim {self.state_dim}; raise it.")

    @abstractmethod
    def build(self) -> PretrainedBackbone:
        """The network: pretrained where ``source`` is given, else random, to be filled from a checkpoint."""

    @abstractmethod
    def processor(self, folder: Path | None = None) -> PretrainedProcessor[Any]:
        """See the base class. Tokenizer and image settings are read from ``source`` or from the checkpoint."""

    def network(self, hub: ModuleType) -> Any:
        """transformers' model with its head: opened where ``source`` is given, else random.

        Args:
            hub: the transformers package.

        Raises:
            ConfigError: it cannot be opened.
        """
        kind, dtype = getattr(hub, self.model_class), getattr(torch, self.dtype)
        if self.source is not None:
            given = (self.model_class, self.auto_class, self.source, self.name)
            return open_network(hub, *given, dtype=dtype, use_safetensors=True)
        options = {**(self.architecture or {}), **self.transformers_options}
        return getattr(hub, self.auto_class).from_config(kind.config_class(**options), dtype=dtype)

    def unread(self) -> Self:
        """See the base class; of a source that is not among those in ``published`` the config is read."""
        if self.source is None:
            return self
        if self.source in self.published:
            return self.built(self.published[self.source]())
        hub = transformers_library(self.name, self.family)
        kind = getattr(hub, self.model_class).config_class
        return self.built(plain_architecture(open_pretrained(kind, self.source, self.name).to_diff_dict()))

    def built(self, architecture: dict[str, Any]) -> Self:
        """The config of a network that was opened, for a checkpoint: with its architecture and without where it came from."""
        return replace(self, source=None, architecture=architecture)

    @abstractmethod
    def image_tokens(self, side: int) -> int:
        """Prefix tokens of one square picture of so many pixels along each side."""

    @property
    def can_answer(self) -> bool:
        """With the published model's head."""
        return True

    @property
    def state_width(self) -> int:
        """State dimensions the network sees, zero beyond S; 0 where it does not read the state."""
        return 0

    @property
    def prefix_attention(self) -> Literal["full", "causal"]:
        """Which prefix tokens see each other."""
        return "causal"

    @property
    def transformers_options(self) -> Mapping[str, Any]:
        """Arguments of transformers' config besides ``architecture``."""
        return {}


class PretrainedBackbone(LanguageBackbone):
    """See the module text. A wrapper says what its family embeds, and where its parts are.

    Attributes:
        network: transformers' model without the language-model head.
        head: that head, or None where it is tied to the embedding table, which is then held once, as in the published weights.
        state: from the padded state to one token; None where the model does not read the state.
    """

    network: Any
    head: nn.Linear | None
    state: nn.Linear | None
    _rotate: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        full = config.network(transformers_library(config.name, config.family))
        if config.source is not None:
            config = config.built(self.architecture_of(full.config))
        self.config = config
        self.network = full.model
        self.head = None if full.config.tie_word_embeddings else full.lm_head
        text = full.config.get_text_config()
        width, heads = text.hidden_size, text.num_attention_heads
        self.spec = BackboneSpec(
            text.num_hidden_layers,
            width,
            heads,
            text.num_key_value_heads,
            getattr(text, "head_dim", None) or width // heads,
            attention=config.prefix_attention,
            state_dim=config.state_dim,
            rotary=True,
        )
        self.state = nn.Linear(config.state_width, width) if config.state_width else None
        for block in self.language.layers:
            block.run = MethodType(run_block, block)  # one call per layer, which sharding can gather weights around
        self._rotate = import_module(f"transformers.models.{config.family}.modeling_{config.family}").apply_rotary_pos_emb

    @staticmethod
    def architecture_of(config: Any) -> dict[str, Any]:
        """What rebuilds a network from transformers' config of it, as JSON data."""
        return plain_architecture(config.to_diff_dict())

    @property
    def language(self) -> Any:
        """The language model: embedding table, layers, norm, rotary embedding."""
        return self.network.language_model

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """See the base class: language layers, and the layers of the vision part."""
        return {**dict.fromkeys(self.language.layers, "run"), **dict.fromkeys(self.vision_blocks, "forward")}

    @property
    def pretrained(self) -> Sequence[nn.Module]:
        """transformers' model and its head."""
        return (self.network,) if self.head is None else (self.network, self.head)

    @property
    def adapted(self) -> Iterable[nn.Linear]:
        """Every matrix of the language layers, as in QLoRA."""
        return (part for part in self.language.layers.modules() if isinstance(part, nn.Linear))

    @property
    def vision_blocks(self) -> Iterable[nn.Module]:
        """The vision part's layers, where it has layers that are alike; none by default."""
        return ()

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views of any size, which the processor resizes."""
        return dict.fromkeys(self.config.views)

    # -- the prefix --------------------------------------------------------------------------------------------------

    def embed(self, inputs: Inputs) -> Prefix:
        """See the base class. The vision part runs here, once for all views of all observations."""
        hidden_BPW = self.embed_prompt(inputs)
        if self.state is not None and inputs.state_BP is not None:
            state_BS = functional.pad(inputs.state_BS, (0, self.state.in_features - inputs.state_BS.shape[1]))
            state_BW = self.state(state_BS.to(self.state.weight.dtype)).to(hidden_BPW.dtype)
            hidden_BPW = hidden_BPW.masked_scatter(inputs.state_BP[..., None], state_BW)
        return Prefix(
            self,
            hidden_BPW,
            padding_mask_BP=inputs.padding_mask_BP,
            rotary=self.language.rotary_emb(hidden_BPW, self.prefix_positions(inputs)),
            next_position_B=inputs.next_position_B,
            state_BS=inputs.state_BS,
            mask_PP=self.prefix_mask(inputs),
        )

    def blank(self, batch: int, side: int) -> Prefix:
        """See the base class; of zeros, without the vision part, because files of the source would be needed to see with it."""
        tokens = len(self.config.views) * self.config.image_tokens(side) + WORDS
        hidden_BPW = self.embed_ids(torch.zeros(batch, tokens, dtype=torch.long))
        position_BP = torch.arange(tokens)[None].expand(batch, -1)
        return Prefix(
            self,
            hidden_BPW,
            rotary=self.language.rotary_emb(hidden_BPW, self.positions(position_BP)),
            next_position_B=torch.full((batch,), tokens),
            state_BS=torch.zeros(batch, self.config.state_dim),
        )

    def vision_numbers(self, batch: int, side: int) -> int:
        """See the base class: what each layer's matrices read and make, or with ``recompute`` what each layer reads."""
        layers = [block for block in self.vision_blocks if any(p.requires_grad for p in block.parameters())]
        sizes = [[(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]
        if not any(sizes):
            return 0
        whole = max(sum(map(sum, layer)) for layer in sizes)
        each = len(sizes) * min(first for first, _ in sizes[0]) + whole if self.config.recompute else len(sizes) * whole
        return batch * len(self.config.views) * self.config.image_tokens(side) * PATCHES * each

    @abstractmethod
    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """Embedded tokens (B, P, W), images in their places; what stands in the state's place is replaced afterwards."""

    def prefix_positions(self, inputs: Inputs) -> Tensor:
        """Positions of the prefix as the model's rotary embedding takes them; by default every token counts one."""
        return torch.arange(inputs.id_BP.shape[1], device=inputs.id_BP.device)[None].expand(len(inputs), -1)

    def prefix_mask(self, inputs: Inputs) -> Tensor | None:
        """Which prefix tokens see which, bool (P, P); None where ``prefix_attention`` says it."""
        return None

    def positions(self, position_BT: Tensor) -> Tensor:
        """Text positions as the model's rotary embedding takes them; by default as they are."""
        return position_BT

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
        recompute = self.config.recompute and self.training and torch.is_grad_enabled()
        hidden_BTW, key_BGTE, value_BGTE = self.language.layers[index].run(
            hidden_BTW, rotary, kv_cache, padding_mask_BT, mask_TS, self._rotate, self.spec.head_dim, recompute
        )
        return hidden_BTW, KeyValues(key_BGTE, value_BGTE, padding_mask_BT)

    def place(self, suffix_BTW: Tensor, prefix: Prefix, offset: int = 0) -> tuple[Tensor, Rotary | None]:
        """Text positions that continue each observation's own; noise samples innermost, as in ``attend``."""
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

    @property
    def vocabulary(self) -> int:
        """Ids the published head can name: more than the tokenizer knows, fewer than the table holds (Molmo2)."""
        head = self.language.embed_tokens if self.head is None else self.head
        return head.weight.shape[0]

    def embed_ids(self, id_BT: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        return self.language.embed_tokens(id_BT)

    def rows(self, id_N: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LanguageBackbone``; where the head is not tied to the table, they differ."""
        read_NW = rows_of(self.language.embed_tokens.weight, id_N)
        return read_NW, read_NW if self.head is None else rows_of(self.head.weight, id_N)

    def name_ids(self, state_NW: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        if self.head is not None:
            return self.head(state_NW)
        return functional.linear(state_NW, self.language.embed_tokens.weight)


def run_block(  # noqa: PLR0917
    block: Any,
    hidden_BTW: Tensor,
    rotary: Rotary,
    kv_cache: KeyValues | None,
    padding_mask_BT: Tensor | None,
    mask_TS: Tensor | None,
    rotate: Callable[..., tuple[Tensor, Tensor]],
    head_dim: int,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One of transformers' language layers on tokens that also read a cache; see ``Backbone.layer``.

    Args:
        block: the layer.
        hidden_BTW, rotary, kv_cache, padding_mask_BT, mask_TS: see ``Backbone.layer``.
        rotate: applies rotary positions to queries and keys.
        head_dim: E.
        recompute: forget activations and compute them again in the backward pass.

    Returns:
        Hidden states, and the tokens' own keys and values.
    """
    if recompute:
        given = (block, hidden_BTW, rotary, kv_cache, padding_mask_BT, mask_TS, rotate, head_dim, False)
        return checkpoint(run_block, *given, use_reentrant=False)
    attention, (b, t, _) = block.self_attn, hidden_BTW.shape
    x_BTW = block.input_layernorm(hidden_BTW)
    query_BTHE, key_BTGE, value_BTGE = (
        project(x_BTW).view(b, t, -1, head_dim) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3's family normalises each head's queries and keys
        query_BTHE, key_BTGE = attention.q_norm(query_BTHE), attention.k_norm(key_BTGE)
    value_BGTE = value_BTGE.transpose(1, 2)
    query_BHTE, key_BGTE = rotate(query_BTHE.transpose(1, 2), key_BTGE.transpose(1, 2), *rotary)
    # Under autocast the rotation is float32 and the values are not; the cache holds both in the values' smaller dtype.
    own = KeyValues(key_BGTE.to(value_BGTE.dtype), value_BGTE, padding_mask_BT)
    mixed_BHTE = attend(query_BHTE.to(value_BGTE.dtype), own, kv_cache, mask_TS)
    hidden_BTW = hidden_BTW + attention.o_proj(mixed_BHTE.transpose(1, 2).reshape(b, t, -1))
    return hidden_BTW + block.mlp(block.post_attention_layernorm(hidden_BTW)), own.key_CGPE, own.value_CGPE


def plain_architecture(data: Any) -> Any:
    """transformers' config as JSON data; what depends on the installed version or on the folder is dropped."""
    if isinstance(data, dict):
        return {
            k: plain_architecture(v) for k, v in data.items() if k not in ("transformers_version", "dtype", "architectures")
        }
    return data
