"""DFM-VLA's assemblies: discrete flow matching over action tokens, through the backbone's own layers.

``tiny`` learns from scratch on a laptop.
"""

from __future__ import annotations

from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.tiny_tokens import tiny_policy


def tiny(data: DataSpec, decoder: DiscreteFlowConfig) -> PolicyConfig:
    """The demo's backbone of four layers and width 128 with this decoder."""
    return tiny_policy(data, "dfm_vla", decoder)
