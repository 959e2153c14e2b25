"""The action tokenizers there are, as types: what is to be fitted, and what has been."""

from __future__ import annotations

from vlaflow.actions.bins import BinsFit, BinsTokenizer
from vlaflow.actions.fast import FastFit, FastTokenizer
from vlaflow.actions.published_fast import PublishedFast, PublishedFastTokenizer

Fit = FastFit | BinsFit | PublishedFast
Fitted = FastTokenizer | BinsTokenizer | PublishedFastTokenizer
