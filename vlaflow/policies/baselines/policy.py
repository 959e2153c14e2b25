"""Assemblies of the baselines: the demo's backbone with the decoders that papers compare with."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.actions.fast import FastFit
from vlaflow.backbones.smol_processor import SHORT
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.policies.asyncvla.policy import QWEN, qwen3b, smol
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.dfm_vla.policy import EMU3, LAST_TEXT, MARKS, emu3
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


def smol_regression(data: DataSpec, source: str | None = SHORT) -> PolicyConfig:
    """The same on the first layers of SmolLM2-135M."""
    policy = smol(data, source=source)
    return replace(policy, system="oft", decoder=RegressionConfig(data.action_dim, queries="action"), exits=None)


def qwen_regression(data: DataSpec, source: str | None = QWEN) -> PolicyConfig:
    """OpenVLA-OFT's decoder on Qwen2.5-VL-3B: chunks of eight, one query token per number, from 1st to 99th percentile."""
    policy = qwen3b(data, source=source)
    return replace(
        policy,
        system="oft",
        decoder=RegressionConfig(data.action_dim, chunk_size=8),
        state_normalisation="quantile",
        action_normalisation="quantile",
    )


def emu3_autoregressive(data: DataSpec, source: str | None = EMU3) -> PolicyConfig:
    """UniVLA's decoder on DFM-VLA's backbone and tokens: one after the other, under a causal mask."""
    decoder = AutoregressiveConfig(data.action_dim, FastFit(50.0, 1024), 10, text_row=LAST_TEXT, marks=MARKS)
    return replace(emu3(data, source=source, attention="causal"), system="autoregressive", decoder=decoder)


def emu3_masked(data: DataSpec, source: str | None = EMU3) -> PolicyConfig:
    """UD-VLA's decoder on DFM-VLA's backbone and tokens: revealed by confidence."""
    decoder = MaskedDiffusionConfig(data.action_dim, FastFit(50.0, 1024), 10, text_row=LAST_TEXT, marks=MARKS)
    return replace(emu3(data, source=source), system="masked_diffusion", decoder=decoder)
