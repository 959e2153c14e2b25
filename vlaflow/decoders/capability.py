"""What decoders may be able to do beyond making whole chunks from noise."""

from __future__ import annotations

from enum import StrEnum


class Capability(StrEnum):
    """What a decoder can do beyond making whole chunks from noise; compute policies say which of these they need."""

    CONDITIONING = "conditioning"
    """``start`` can begin from given actions."""
    TOKEN_CONDITIONING = "token-conditioning"  # noqa: S105
    """``start`` can begin from given tokens of a vocabulary, and every solver step may revise tokens."""
    REGENERATION = "regeneration"
    """It was trained to make some actions or tokens while the others are given clean."""
    DETERMINISTIC_STEPS = "deterministic-steps"
    """It has a ``refine_deterministic``: deterministic steps that may still revise every token."""
    PREFIX_REFRESH = "prefix-refresh"
    """It has a ``refreshing``: the share of changed tokens from which the prefix is run again can be chosen."""
    CONTINUOUS = "continuous"
    """Its tokens glide from Gaussian noise: the scale of the noise and the solver can be chosen."""
    GRID = "grid"
    """The clocks of its solver steps can be stated."""
    TEMPERATURE = "temperature"
    """It draws tokens, and the temperature can be chosen."""
    EXPECTED = "expected"
    """The ids of its tokens are ordered by value, so a mean of them has a nearest token."""
    JOINT_ATTENTION = "joint-attention"
    """The prefix reads the action tokens too, so keys and values kept from an earlier step are an approximation."""
