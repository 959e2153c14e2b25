"""Qwen2.5-VL as a backbone: its own processor, chat template, vision tower, multimodal rotary positions and layers.

The modules are those of transformers; only the order in which they run is ours, so that a prefix can stop at any layer and
other tokens can read its keys and values. The prefix is causal, as the model was pretrained; what a decoder adds sees the
whole prefix and all of itself. transformers is imported when the first network is built, never before.

A new policy starts from ``source`` (a local folder or a Hub name). The network it gets carries a config with the
``architecture`` written out and no source, and copies of tokenizer and image settings; a checkpoint holds those, so it
opens without the original, without a network connection, and with no other code than vlaflow's and transformers'.

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state dimension, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlaflow.backbones.base import Backbone, BackboneSpec, Prefix, Rotary
from vlaflow.backbones.qwen2_5_vl_prompt import PromptReader, open_pretrained, transformers_library
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, CheckpointError, ConfigError, SpecError
from vlaflow.nn.attention import KeyValues, attend, causal_mask
from vlaflow.nn.block import Rotate

PATCH = 28 * 28  # pixels of one image token: 2 × 2 patches of 14 × 14


def qwen2_5_vl_3b() -> dict[str, Any]:
    """The architecture of Qwen2.5-VL-3B, 3.755 B parameters, for networks without pretrained weights (and for counting)."""
    return {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        "tie_word_embeddings": True,
    }


@dataclass(frozen=True)
class QwenConfig:
    """The Qwen2.5-VL backbone.

    Args:
        state_dim: length of the proprioceptive state, S.
        views: camera views, any number, in the order in which the user turn shows them.
        source: local folder or Hub name of a pretrained model to start from; None when ``architecture`` is given.
        architecture: transformers' text and vision config as JSON data, for random weights or those of a checkpoint.
        min_pixels, max_pixels: an image is resized, keeping its shape, until its area lies between (64 to 128 tokens).
        padded_state: state dimensions the network sees, zero beyond S.
        system: the system turn.
        state_token: a token that stands for the state in the user turn; one that no instruction uses.
        dtype: of the pretrained parts. Train in float32 under bf16 autocast; bfloat16 halves the memory of serving.
        recompute: forget activations in training and compute them again, layer by layer (less memory, a third more time).
    """

    state_dim: int
    views: tuple[str, ...]
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None, repr=False)
    min_pixels: int = 64 * PATCH
    max_pixels: int = 128 * PATCH
    padded_state: int = 32
    system: str = "You move a robot. Look at the images and its state, and do what the user asks."
    state_token: str = "<|vision_pad|>"  # noqa: S105
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.architecture is None):
            raise ConfigError("A Qwen2.5-VL backbone needs either 'source' (a folder or Hub name) or 'architecture'.")
        if len(set(self.views)) != len(self.views):
            raise ConfigError(f"Camera views must differ, got {list(self.views)}.")
        if self.state_dim > self.padded_state:
            raise ConfigError(f"padded_state {self.padded_state} is smaller than state_dim {self.state_dim}; raise it.")
        if not PATCH <= self.min_pixels <= self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} must lie between {PATCH} and max_pixels {self.max_pixels}.")

    def build(self) -> QwenBackbone:
        """The network: pretrained where ``source`` is given, else random, to be filled from a checkpoint."""
        return QwenBackbone(self)


class QwenBackbone(Backbone):
    """See the module text.

    ``network`` is transformers' ``Qwen2_5_VLModel`` (vision tower and language layers). A tied language-model head is the
    embedding table itself and is held once, as in the published weights; an untied one is ``head``.
    """

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        hub, dtype = transformers_library(), getattr(torch, config.dtype)
        self.reader: PromptReader | None = None
        if config.source is not None:
            full = open_pretrained(hub.Qwen2_5_VLForConditionalGeneration, config.source, dtype=dtype, use_safetensors=True)
            self.reader = PromptReader.open(config.source)
            config = replace(config, source=None, architecture=_plain(full.config.to_diff_dict()))
        else:
            full = hub.AutoModelForImageTextToText.from_config(hub.Qwen2_5_VLConfig(**(config.architecture or {})), dtype=dtype)
        self.config = config
        self.network = full.model
        self.head = None if full.config.tie_word_embeddings else full.lm_head
        text = full.config.text_config
        heads, width = text.num_attention_heads, text.hidden_size
        self.spec = BackboneSpec(
            text.num_hidden_layers,
            width,
            heads,
            text.num_key_value_heads,
            width // heads,
            attention="causal",
            state_dim=config.state_dim,
            rotary=True,
        )
        self.state = nn.Linear(config.padded_state, width)
        self._rotate = hub.models.qwen2_5_vl.modeling_qwen2_5_vl.apply_rotary_pos_emb
        if config.recompute:
            self.network.visual.activation_checkpointing_enable()

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views of any size; the processor resizes them by area."""
        return dict.fromkeys(self.config.views)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """See the base class. The vision tower runs here, once for all views of all observations.

        Raises:
            SpecError: for a state of another length, or an instruction with one of the tokenizer's own tokens.
            CapabilityError: for a network that has neither been given a ``source`` nor opened from a checkpoint.
        """
        c, table = self.config, self.network.language_model.embed_tokens
        if observation.state_BS.shape[1] != c.state_dim:
            raise SpecError(f"The policy expects a state of length {c.state_dim}, got {observation.state_BS.shape[1]}.")
        prompt = self._reading().read(observation, c)
        position_3BP, _ = self.network.get_rope_index(
            prompt.id_BP,
            mm_token_type_ids=prompt.image_BP.int(),
            image_grid_thw=prompt.grid_I3,
            attention_mask=prompt.seen_BP.long(),
        )
        next_position_B = position_3BP.masked_fill(~prompt.seen_BP, -1).amax((0, 2)) + 1
        device = table.weight.device
        hidden_BPW = table(prompt.id_BP.to(device))
        if prompt.patches is not None and prompt.grid_I3 is not None:
            features = self.network.get_image_features(prompt.patches.to(device), prompt.grid_I3.to(device), return_dict=True)
            image_NW = torch.cat(tuple(features.pooler_output)).to(hidden_BPW.dtype)
            hidden_BPW = hidden_BPW.masked_scatter(prompt.image_BP[..., None].to(device), image_NW)
        state_BS = functional.pad(observation.state_BS, (0, c.padded_state - c.state_dim)).to(device, self.state.weight.dtype)
        hidden_BPW = hidden_BPW.masked_scatter(prompt.state_BP[..., None].to(device), self.state(state_BS).to(hidden_BPW.dtype))
        return Prefix(
            self,
            hidden_BPW,
            seen_BP=None if bool(prompt.seen_BP.all()) else prompt.seen_BP.to(device),
            rotary=self.network.language_model.rotary_emb(hidden_BPW, position_3BP.to(device)),
            next_position_B=next_position_B.to(device),
            state_BS=observation.state_BS,
        )

    def layer(
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary | None = None,
        memory: KeyValues | None = None,
        seen_BT: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> tuple[Tensor, KeyValues]:
        """See the base class; ``rotary`` is required."""
        assert rotary is not None
        if self.config.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._layer, index, hidden_BTW, rotary, memory, seen_BT, causal=causal, use_reentrant=False)
        return self._layer(index, hidden_BTW, rotary, memory, seen_BT, causal=causal)

    def _layer(
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary,
        memory: KeyValues | None,
        seen_BT: Tensor | None,
        *,
        causal: bool,
    ) -> tuple[Tensor, KeyValues]:
        block = self.network.language_model.layers[index]
        attention, (b, t, _) = block.self_attn, hidden_BTW.shape
        x_BTW = block.input_layernorm(hidden_BTW)
        query_BHTE, key_BGTE, value_BGTE = (
            project(x_BTW).view(b, t, -1, self.spec.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query_BHTE, key_BGTE = self._rotate(query_BHTE, key_BGTE, *rotary)
        # Under autocast the rotation is float32 and the values are not; the memory keeps one, small, number format.
        own = KeyValues(key_BGTE.to(value_BGTE.dtype), value_BGTE, seen_BT)
        mask_TS = causal_mask(t, hidden_BTW.device) if causal else None
        mixed_BHTE = attend(query_BHTE.to(value_BGTE.dtype), own, memory, mask_TS)
        hidden_BTW = hidden_BTW + attention.o_proj(mixed_BHTE.transpose(1, 2).reshape(b, t, -1))
        return hidden_BTW + block.mlp(block.post_attention_layernorm(hidden_BTW)), own

    def place(self, suffix_BTW: Tensor, prefix: Prefix) -> tuple[Tensor, Rotary | None]:
        """Text positions that continue each observation's own; draws innermost, as in ``attend``."""
        suffix_BTW = suffix_BTW.to(prefix.hidden_BPW.dtype)
        return suffix_BTW, self._after(prefix, *suffix_BTW.shape[:2])

    def rotation(self, prefix: Prefix, batch: int, tokens: int) -> Rotate:
        """See the base class."""
        cosine, sine = self._after(prefix, batch, tokens)
        return lambda query_BHTE, key_BGTE: self._rotate(query_BHTE, key_BGTE, cosine, sine)

    def select_rotary(self, rotary: Rotary, row_R: Tensor) -> Rotary:
        """The first dimension is the kind of position (time, height, width)."""
        return rotary[0][:, row_R], rotary[1][:, row_R]

    def _after(self, prefix: Prefix, batch: int, tokens: int) -> Rotary:
        assert prefix.next_position_B is not None
        first_B = prefix.next_position_B.repeat_interleave(batch // prefix.batch)
        position_BT = first_B[:, None] + torch.arange(tokens, device=first_B.device)
        return self.network.language_model.rotary_emb(prefix.hidden_BPW, position_BT.expand(3, -1, -1))

    def finish(self, hidden_BTW: Tensor) -> Tensor:
        """The final RMSNorm."""
        return self.network.language_model.norm(hidden_BTW)

    # -- language ----------------------------------------------------------------------------------------------------

    def logits(self, hidden_BTW: Tensor) -> Tensor:
        """Next-token logits (B, T, vocabulary) of hidden states that have run through all layers."""
        finished_BTW = self.finish(hidden_BTW)
        if self.head is not None:
            return self.head(finished_BTW)
        return functional.linear(finished_BTW, self.network.language_model.embed_tokens.weight)

    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Tokens of an assistant turn with its end, (B, T) int64, padded with −100."""
        return self._reading().answers(answers)

    def answer_loss(self, prefix: Prefix, answer_ids: Tensor) -> Tensor:
        """Mean cross-entropy of the answer's tokens, each predicted from the prefix and the answer before it.

        Args:
            prefix: observations, run to any depth.
            answer_ids: (B, T); negative entries, which may only follow an answer's end, do not count.
        """
        prefix = self.run(prefix)
        target_BT = answer_ids.to(prefix.hidden_BPW.device)
        known_BT = target_BT >= 0
        answer_BTW = self.network.language_model.embed_tokens(target_BT.clamp(min=0))
        hidden_BTW, rotary = self.place(answer_BTW, prefix)
        for index, memory in enumerate(prefix.memory):
            hidden_BTW, _ = self.layer(index, hidden_BTW, rotary, memory, causal=True)
        last_B = torch.full_like(target_BT[:, 0], prefix.hidden_BPW.shape[1] - 1)
        if prefix.seen_BP is not None:
            last_B = prefix.seen_BP.sum(1) - 1
        first_B1W = prefix.hidden_BPW[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
        before_BTW = torch.cat((first_B1W, hidden_BTW[:, :-1]), 1)
        loss = functional.cross_entropy(self.logits(before_BTW[known_BT]).float(), target_BT[known_BT], reduction="sum")
        return loss / known_BT.sum().clamp(min=1)

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
        self.reader = PromptReader.open(str(folder / "processor"))

    def _reading(self) -> PromptReader:
        if self.reader is None:
            raise CapabilityError(
                "This Qwen2.5-VL network has no tokenizer: it was built from an architecture alone. "
                "Build it with 'source', or open a checkpoint with Policy.from_pretrained."
            )
        return self.reader


def _plain(data: Any) -> Any:
    """Architecture only: what depends on the installed version or on the folder is dropped."""
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items() if k not in ("transformers_version", "dtype", "architectures")}
    return data
