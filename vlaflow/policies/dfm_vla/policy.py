"""DFM-VLA's assemblies: discrete flow matching over action tokens, through the backbone's own layers.

``tiny`` learns from scratch on a laptop; ``emu3`` is the published size.
"""

from __future__ import annotations

from typing import Literal

from vlaflow.actions.fast import FastFit
from vlaflow.backbones.emu3 import EmuConfig, emu3_8b
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.tiny import token_policy

EMU3 = "Emu3-community/Emu3-Stage1-hf"
MARKS = (151_844, 151_845)
"""Ids of Emu3's that begin and end the actions in UniVLA: boa and eoa."""
LAST_TEXT = 151_642
"""The last id of Emu3's text, which no text uses; action tokens begin as this row and the ones before it, as in UniVLA."""


def tiny(data: DataSpec, decoder: DiscreteFlowConfig) -> PolicyConfig:
    """The demo's backbone of four layers and width 128 with this decoder."""
    return token_policy(data, "dfm_vla", decoder)


def emu3(
    data: DataSpec,
    *,
    chunk_size: int = 10,
    source: str | None = EMU3,
    attention: Literal["full", "causal"] = "full",
) -> PolicyConfig:
    """DFM-VLA as far as the paper specifies it: Emu3, FAST at scale 50 with 1024 ids, everything sees everything, 14 + 2 steps.

    Actions reach from −1 to 1 between their 1st and 99th percentile and are clipped there, as in UniVLA.

    Args:
        data: shape of the data set; the state is not read.
        chunk_size: actions per chunk, all of them executed (UniVLA, UD-VLA: 10).
        source: folder or Hub name of the pretrained weights; None for random weights of the same shape.
        attention: which prefix tokens see each other.
    """
    architecture = None if source else emu3_8b()
    return PolicyConfig(
        system="dfm_vla",
        backbone=EmuConfig(data.state_dim, data.views, source, architecture, recompute=True, attention=attention),
        decoder=DiscreteFlowConfig(
            data.action_dim,
            FastFit(50.0, 1024),
            chunk_size,
            text_row=LAST_TEXT,
            marks=MARKS,
            attention="full",
            refresh=0.3,
        ),
        action_normalisation="quantile",
        action_clip=1.0,
        n_action_steps=chunk_size,
    )
