"""What a backbone's config answers before there is a network."""

from dataclasses import dataclass

import pytest

from vlaflow.backbones.base import BackboneConfig
from vlaflow.backbones.emu3 import EmuConfig, emu3_8b
from vlaflow.backbones.qwen2_5_vl import QwenConfig
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.errors import CapabilityError
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.asyncvla.policy import qwen3b_rater, tiny_rater
from vlaflow.policies.base import PolicyConfig


@dataclass(frozen=True)
class Plain(BackboneConfig):
    """What must be written, and no more."""

    state_dim: int = 2
    views: tuple[str, ...] = ("image",)

    def build(self):
        raise NotImplementedError

    def processor(self, folder=None):
        raise NotImplementedError


def test_a_plain_backbone_promises_nothing():
    plain = Plain()
    assert not plain.can_answer
    assert plain.longest_instruction is None
    assert plain.longest_answer is None
    with pytest.raises(CapabilityError, match="rater"):
        plain.rater_block()


def test_limits_name_the_key_that_raises_them():
    tiny = TinyConfig(2, text_bytes=32, suffix=9)
    for limit, size in ((tiny.longest_instruction, 32), (tiny.longest_answer, 8)):
        assert limit.size == size
        assert limit.key in ("text_bytes", "suffix")
        assert hasattr(tiny, limit.key)


def test_raters_are_made_of_blocks_like_the_backbones():
    tiny = PolicyConfig("a", TinyConfig(2, width=32, heads=4), FlowConfig(2))
    assert tiny_rater(tiny).block == BlockConfig(32, 4, 4, 8, 128)
    published = PolicyConfig("a", QwenConfig(2, ("image",), source="Qwen/Qwen2.5-VL-3B-Instruct"), FlowConfig(2))
    rater = qwen3b_rater(published)
    assert rater.block == BlockConfig(2048, 16, 2, 128, 11008, norm="rms", gated=True, qkv_bias=True)
    assert rater.depth == 4


def test_a_qwen_of_another_size_gets_a_rater_of_its_size():
    small = {"text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}}
    block = QwenConfig(2, ("image",), architecture=small).rater_block()
    assert (block.width, block.heads, block.kv_heads, block.head_dim, block.ffn) == (64, 4, 2, 16, 96)


def test_pretrained_models_answer_and_the_tiny_one_where_it_has_a_table():
    assert EmuConfig(2, ("image",), architecture=emu3_8b()).can_answer
    assert TinyConfig(2, answers=True).can_answer
    assert not TinyConfig(2).can_answer
