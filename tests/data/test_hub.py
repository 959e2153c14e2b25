"""Data sets on the Hub, against a small one on loopback: what is fetched, what is recorded, and what fails in one sentence."""

import json
import shutil

import pytest

from tests.data.toyset import edit_info
from tests.hub_server import commit_of, hub, read_folder
from vlaflow.data.hub import needed, origin, title
from vlaflow.data.lerobot import Dataset

OPEN = """
from vlaflow.data.hub import origin
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import VlaflowError
try:
    dataset = Dataset.open({name!r})
    print(len(dataset), len(dataset.frames(0, "corner")), origin(dataset.root), dataset.fingerprint)
except VlaflowError as error:
    print(error)
"""


@pytest.fixture
def server(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "toy")
    (folder / "README.md").write_text("A card.")
    (folder / "training").mkdir()
    (folder / "training/model.safetensors").write_bytes(b"0" * 1000)
    (folder / "videos/observation.images.depth").mkdir()
    (folder / "videos/observation.images.depth/old.mp4").write_bytes(b"not declared")
    (tmp_path / "home").mkdir()
    with hub(tmp_path / "home", {"user/toy": folder}) as running:
        yield running


def opened(server, name, **environment):
    done = server.python(OPEN.format(name=name), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_data_set_of_the_hub_is_that_of_its_folder_and_its_commit_is_known(server, pristine):
    commit = commit_of(server.repositories["datasets/user/toy"])
    here = Dataset.open(pristine)
    expected = f"{len(here)} {here.episodes[0].length} hf://user/toy@{commit} {here.fingerprint}"
    assert opened(server, "user/toy") == expected
    assert sorted(server.fetched) == sorted(p for p in read_folder(pristine) if not p.startswith("."))

    server.fetched.clear()
    assert opened(server, f"hf://user/toy@{commit}") == expected
    assert server.fetched == []

    assert opened(server, "user/toy", HF_HUB_OFFLINE="1") == expected


def test_the_commands_take_a_name_and_show_the_commit(server):
    done = server.run("data", "check", "user/toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems" in done.stdout
    assert "is fetched from the Hugging Face Hub" in done.stderr
    done = server.run("data", "show", "hf://user/toy")
    assert f"hf://user/toy@{commit_of(server.repositories['datasets/user/toy'])}" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("hf://user/typo", "has no data set hf://user/typo, or it is private"),
        ("hf://user/toy@v9", "hf://user/toy@v9 has no such revision"),
        ("hf://user/closed", "asks for consent"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(server, name, sentence):
    server.gated.add("datasets/user/closed")
    said = opened(server, name)
    assert sentence in said
    assert "\n" not in said


def test_without_a_connection_it_is_one_sentence(server):
    offline = opened(server, "hf://user/toy", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in offline
    unreachable = opened(server, "hf://user/toy", HF_ENDPOINT="http://127.0.0.1:9")
    assert "hf://user/toy could not be fetched from http://127.0.0.1:9" in unreachable
    assert "\n" not in offline + unreachable


def test_a_pushed_data_set_can_be_fetched_and_is_tagged_with_its_format(server, pristine):
    done = server.run("data", "push", str(pristine), "user/new")
    assert done.returncode == 0, done.stderr
    files = server.repositories["datasets/user/new"]
    commit = commit_of(files)
    assert f"hf://user/new@{commit}" in done.stdout.replace("\n", "")
    assert server.tags == {"datasets/user/new": {"v3.0": commit}}
    assert {p: d for p, d in files.items() if p != "README.md"} == {
        p: d for p, d in read_folder(pristine).items() if not p.startswith(".")
    }
    assert opened(server, "hf://user/new@v3.0").endswith(f"hf://user/new@{commit} {Dataset.open(pristine).fingerprint}")
    (pristine.parent / "gone").mkdir(exist_ok=True)
    done = server.run("data", "push", str(pristine.parent / "gone"), "user/new")
    assert done.returncode == 2
    assert "is not a LeRobot data set" in done.stderr


def test_a_push_without_a_connection_is_one_sentence(server, pristine):
    done = server.run("data", "push", str(pristine), "user/new", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "could not be pushed to hf://user/new" in done.stderr.strip().splitlines()[-1]


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
