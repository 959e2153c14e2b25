import shutil

import pytest


@pytest.fixture
def new(pristine, tmp_path):
    """A good v3.0 data set to change."""
    return shutil.copytree(pristine, tmp_path / "new")


@pytest.fixture
def old(pristine_v21, tmp_path):
    """A good v2.1 data set to change."""
    return shutil.copytree(pristine_v21, tmp_path / "old")
