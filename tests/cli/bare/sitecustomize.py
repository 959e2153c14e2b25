"""Imported by every Python process that starts with this folder on PYTHONPATH."""

import sys

from tests.cli.core_only import CoreOnly, hidden_modules

hidden = hidden_modules()
sys.meta_path[:] = [CoreOnly(finder, hidden) for finder in sys.meta_path]
