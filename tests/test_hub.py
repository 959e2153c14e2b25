"""What a name means: a folder, a repository on the Hub, or a mistake that is said with both readings."""

from pathlib import Path

import pytest

from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.hub import HubName, _announce, hub_name, is_offline
from vlaflow.policies.checkpoint import local_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with runs/demo/dataset and runs/peg in it."""
    (tmp_path / "runs/demo/dataset").mkdir(parents=True)
    (tmp_path / "runs/peg").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    _announce.cache_clear()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("hf://user/toy", HubName("user/toy")),
        ("hf://user/toy@v3.0", HubName("user/toy", "v3.0")),
        ("hf://datasets/user/toy@refs/pr/1", HubName("user/toy", "refs/pr/1")),
        (Path("hf://user/toy"), HubName("user/toy")),
        ("hf://runs/peg", HubName("runs/peg")),
    ],
)
def test_an_explicit_name_always_means_the_hub(given, name, capsys):
    assert hub_name(given, "data set") == name
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "given", ["runs/peg", "runs/demo/dataset", "runs/demo/typo", "typo", "/user/toy", "./user/toy", "../a/b", "~a/b"]
)
def test_paths_are_paths(given, capsys):
    """What exists, and what cannot be a name."""
    assert hub_name(given, "data set") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["user/toy", Path("user/toy"), "user/toy@main"])
def test_a_bare_name_means_the_hub_if_no_such_folder_is_near_and_it_is_said(given, capsys):
    found = hub_name(given, "data set")
    assert found is not None
    assert found.repository == "user/toy"
    assert capsys.readouterr().err.startswith(f"There is no folder {given} here, so the data set {found} is fetched")
    hub_name(given, "data set")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_can_forbid_the_network_as_well(monkeypatch, capsys, value, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() == offline
    hub_name("user/toy", "data set")
    assert ("taken from the cache" in capsys.readouterr().err) == offline


@pytest.mark.parametrize(
    ("given", "hint"),
    [("runs/dmo", "did you mean runs/demo?"), ("runs/zzz", "runs/zzz. If"), ("runs/peg@main", "runs/peg@main")],
)
def test_a_mistyped_path_is_refused_with_both_readings(given, hint):
    with pytest.raises(ConfigError, match="There is no folder") as error:
        hub_name(given, "data set")
    assert hint in str(error.value)
    assert str(error.value).endswith(f"is meant, write hf://{given}")


@pytest.mark.parametrize("given", ["hf://", "hf://toy", "hf://a/b/c", "hf://a/b@", "hf://../b", "hf://a b/c"])
def test_a_name_that_cannot_be_one_is_refused(given):
    with pytest.raises(ConfigError, match=r"names no data set on the Hub\. Write hf://USER/NAME"):
        hub_name(given, "data set")


def test_checkpoints_follow_the_same_rule():
    assert local_folder("runs/peg") == Path("runs/peg")
    with pytest.raises(ConfigError, match="the checkpoint of that name on the Hugging Face Hub is meant, write hf://runs/pge"):
        local_folder("runs/pge")
    with pytest.raises(CheckpointError, match="There is no checkpoint folder nowhere"):
        local_folder("nowhere")
