import shutil

import pytest

from tests.data.toyset import write_v3, write_v21
from vlaflow.data.lerobot import Dataset


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A good v3.0 data set; never changed."""
    return write_v3(tmp_path_factory.mktemp("pristine") / "toy")


@pytest.fixture(scope="session")
def pristine_v21(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine21") / "toy"
    root.mkdir()
    return write_v21(root)


@pytest.fixture
def copy(pristine, tmp_path):
    """A good v3.0 data set to damage."""
    return shutil.copytree(pristine, tmp_path / "copy")


@pytest.fixture
def dataset(copy):
    return Dataset.open(copy)
