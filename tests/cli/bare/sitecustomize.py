"""Imported by every Python process that starts with this folder on PYTHONPATH."""

import sys

from tests.cli.core_only import CoreOnly

sys.meta_path.insert(0, CoreOnly())
