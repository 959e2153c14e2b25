"""Assemblies of the baselines: the demo's backbone with the decoders that papers compare with."""

from __future__ import annotations

from vlaflow.actions.fast import FastFit
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.tiny import COEFFICIENTS, FAST, tiny_backbone, token_policy


def autoregressive(data: DataSpec, tokenizer: FastFit = FAST) -> PolicyConfig:
    """FAST tokens one after the other, greedily."""
    return token_policy(data, "autoregressive", AutoregressiveConfig(data.action_dim, tokenizer))


def masked(data: DataSpec) -> PolicyConfig:
    """Coefficients revealed by confidence."""
    return token_policy(data, "masked_diffusion", MaskedDiffusionConfig(data.action_dim, COEFFICIENTS))


def flow(data: DataSpec) -> PolicyConfig:
    """Continuous actions, all at one clock."""
    return token_policy(data, "flow", FlowConfig(data.action_dim, masks="synchronous", noise_samples=1))


def regression(data: DataSpec) -> PolicyConfig:
    """The chunk from one query token per action, in one pass."""
    return PolicyConfig("oft", tiny_backbone(data), RegressionConfig(data.action_dim, queries="action"))
