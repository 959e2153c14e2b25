"""Tokenizers as a user fits, compares and trains with them."""

from tests.data.toyset import *  # noqa: F403
