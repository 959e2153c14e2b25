"""Data sets on the Hub, against a small one on loopback: what is fetched, what is recorded, and what fails in one sentence."""

import importlib
import json
import re
import shutil
from dataclasses import fields, is_dataclass

import pytest

from tests.data.toyset import edit_info
from tests.helpers import policy
from tests.hub_server import commit_of, hub, read_folder
from vlaflow.cli.main import COMMANDS
from vlaflow.data.hub import needed, title
from vlaflow.data.lerobot import Dataset
from vlaflow.hub import origin


@pytest.fixture
def server(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "toy")
    (folder / "README.md").write_text("A card.")
    (folder / "training").mkdir()
    (folder / "training/model.safetensors").write_bytes(b"0" * 1000)
    (folder / "videos/observation.images.depth").mkdir()
    (folder / "videos/observation.images.depth/old.mp4").write_bytes(b"not declared")
    (tmp_path / "home").mkdir()
    policy(chunk_size=4, action_dim=2).save_pretrained(tmp_path / "policy")
    with hub(tmp_path / "home", {"user/toy": folder}, {"user/policy": tmp_path / "policy"}) as running:
        yield running


def test_data_sets_are_fetched_shown_refused_and_pushed(server, pristine, tmp_path):
    """One process for all, since starting one takes longer than what it does."""
    commit, here = commit_of(server.repositories["datasets/user/toy"]), Dataset.open(pristine)
    server.gated.add("datasets/user/closed")
    (tmp_path / "empty").mkdir()
    policy_commit = commit_of(server.repositories["models/user/policy"])
    bare, explicit, check, show, typo, revision, gated, push, pushed, empty, promises, moved = server.run(
        "user/toy",
        f"hf://user/toy@{commit}",
        ["data", "check", "user/toy"],
        ["data", "show", "hf://user/toy"],
        "hf://user/typo",
        "hf://user/toy@v9",
        "hf://user/closed",
        ["data", "push", str(pristine), "user/new"],
        "hf://user/new@v3.0",
        ["data", "push", str(tmp_path / "empty"), "user/new"],
        ["check", "policy", "user/policy"],
        ["check", "policy", "hf://user/policy@v9"],
    )
    files = sorted(path for path in read_folder(pristine) if not path.startswith("."))

    # what is fetched is the data set of the folder; only its own files are fetched, once, and the commit is known
    facts = f"{len(here)} {here.episodes[0].length} hf://user/toy@{commit} {here.fingerprint}"
    assert bare[1].strip() == explicit[1].strip() == facts
    of_policy = [path for path in read_folder(tmp_path / "policy") if path in server.fetched]
    assert {"config.json", "model.safetensors"} <= {*of_policy}
    assert sorted(server.fetched) == sorted([*files, *files, *of_policy])  # of user/toy and of user/new; the policy once
    assert promises[0] == 0
    assert "is fetched from the Hugging Face Hub" in bare[2]
    assert explicit[2] == ""
    assert (check[0], show[0]) == (0, 0)
    assert "No problems" in check[1]
    assert f"hf://user/toy@{commit}" in show[1].replace("\n", "")

    # what the Hub refuses is one sentence
    for (status, _, said), sentence in (
        (typo, "has no data set hf://user/typo, or it is private, and there is no folder user/typo here"),
        (revision, "hf://user/toy@v9 has no such revision"),
        (gated, "asks for consent"),
        (moved, "hf://user/policy@v9 has no such revision"),
    ):
        assert status == 2
        assert sentence in said
        assert said.count("\n") == 1

    # what is pushed is the data set, tagged with its format, and can be fetched
    made = server.repositories["datasets/user/new"]
    assert f"hf://user/new@{commit_of(made)}" in push[1].replace("\n", "")
    assert server.tags == {"datasets/user/new": {"v3.0": commit_of(made)}}
    assert {path: made[path] for path in files} == {path: read_folder(pristine)[path] for path in files}
    assert not any(path.startswith(".cache") for path in made)
    assert pushed[1].strip().endswith(f"hf://user/new@{commit_of(made)} {here.fingerprint}")
    assert empty[0] == 2
    assert "is not a LeRobot data set" in empty[2]

    # offline, what was fetched is there, at its commit; what is missing is named, and nobody is asked
    asked, cache = server.asked, tmp_path / "home/hub"
    (cache / f"models--user--policy/snapshots/{policy_commit}/model.safetensors").rename(tmp_path / "weights")
    check, again, missing, cut, whole = server.run(
        ["data", "check", "user/toy", "--offline"],
        "user/toy",
        "hf://user/else",
        ["check", "policy", "user/policy", "--offline"],
        ["data", "spec", f"user/toy@{commit}", "--offline"],
    )
    assert (check[0], again[0], whole[0]) == (0, 0, 0)
    assert "is taken from the cache" in check[2]
    assert again[1].strip() == facts
    for (status, _, said), name in ((missing, "hf://user/else"), (cut, "hf://user/policy")):
        assert status == 2
        assert re.search(rf"^{name} is not \(completely\) in the cache .* nothing may be fetched", said, re.MULTILINE)
        assert "Fetch it once without --offline" in said
    assert server.asked == asked


def test_without_a_connection_it_is_one_sentence(server, pristine):
    fetch, push = server.run("hf://user/toy", ["data", "push", str(pristine), "user/new"], HF_ENDPOINT="http://127.0.0.1:9")
    assert "hf://user/toy could not be fetched from http://127.0.0.1:9" in fetch[2]
    assert "there is no folder user/toy here" in fetch[2]
    assert "could not be pushed to hf://user/new" in push[2].strip().splitlines()[-1]
    assert (fetch[0], push[0]) == (2, 2)
    assert fetch[2].count("\n") == 1


def test_only_declared_tables_and_videos_are_needed(copy):
    expected = [
        "data/chunk-*/file-*.parquet",
        "videos/observation.image/chunk-*/file-*.mp4",
        "videos/observation.images.corner/chunk-*/file-*.mp4",
    ]
    assert needed(copy) == expected
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    edit_info(copy, features={**features, "observation.image": {**features["observation.image"], "dtype": "image"}})
    assert needed(copy) == [expected[0], expected[2], "images/*"]
    (copy / "meta/info.json").write_text(json.dumps({"features": 5}))
    assert needed(copy) == []


def test_a_folder_outside_the_hubs_cache_has_no_origin(copy, tmp_path):
    assert origin(copy) is None
    assert title(copy) == "copy"
    cached = tmp_path / f"datasets--user--a--b/snapshots/{'0' * 40}"
    assert origin(cached) == title(cached) == f"hf://user/a--b@{'0' * 40}"


def test_every_command_that_opens_a_data_set_can_be_forbidden_the_network():
    for command in COMMANDS:
        module = importlib.import_module(f"vlaflow.cli.{command.replace('-', '_')}")
        kinds = [kind for kind in vars(module).values() if is_dataclass(kind) and kind.__module__ == module.__name__]
        options = {kind.__name__: {each.name for each in fields(kind)} for kind in kinds}
        assert not [name for name, known in options.items() if "how" in known and "hub" not in known]
