"""Fixtures of the rooms whose results the pages show."""

from tests.data.conftest import copy, dataset, pristine
from tests.evaluation.latents import root

__all__ = ["copy", "dataset", "pristine", "root"]
