"""What a checkpoint learned from, and the order of its training states."""

import json

import pytest

from tests.training.small import write_dataset
from vlaflow.cli.main import main
from vlaflow.config import to_json
from vlaflow.data.lerobot import Dataset
from vlaflow.data.windows import split_episodes
from vlaflow.errors import CheckpointError
from vlaflow.policies.provenance import (
    TrainedOn,
    TrainedVqa,
    ancestry,
    fingerprint,
    new_episodes,
    newest_state,
    run_of,
    state_folder,
    trained_on,
    training_states,
)


def write_state(folder, step, **run):
    state_folder(folder, step).mkdir(parents=True)
    (state_folder(folder, step) / "state.json").write_text(json.dumps({"run": run}))


def run_from(fraction, seed, data="d", **more):
    return {"data": data, "config": {"validation_fraction": fraction, "seed": seed}, **more}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("data") / "dataset"))


@pytest.mark.parametrize("command", ["serve", "eval", "deploy", "bench latency", "calibrate"])
def test_a_folder_that_is_no_checkpoint_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    """Serving the data set in place of the policy is an easy mistake."""
    monkeypatch.setattr("vlaflow.engine.store.require_compiler", lambda _: None)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # the log of vlaflow serve is not for the tests after this one
    more = {
        "eval": ["--env", "obstacle/pass-v0", "--out", f"{tmp_path}/out"],
        "calibrate": ["--dataset", f"{tmp_path}", "--exit-budget", "0.4"],
    }
    (tmp_path / "dataset").mkdir()
    assert main([*command.split(), f"{tmp_path}/dataset", *more.get(command, [])]) == 2
    assert "config.json is missing; " in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    for name in ("config.json", "action_spec.json", "stats.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; .* is not a complete checkpoint"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(Is a directory\)"):
        fingerprint(tmp_path)


def test_training_states_are_in_the_order_of_their_steps(tmp_path):
    """By number: as text, step-1000000 comes before step-999999, and step-10 before step-9."""
    steps = [9, 10, 999_999, 100_000, 1_000_000]
    for step in steps:
        write_state(tmp_path, step, recipe=str(step))
    (tmp_path / "training/step-final").mkdir()
    write_state(tmp_path / "short", 2)
    (tmp_path / "short/training/step-000002").rename(tmp_path / "short/training/step-2")
    assert [step for step, _ in training_states(tmp_path)] == sorted(steps)
    assert newest_state(tmp_path) == (1_000_000, tmp_path / "training/step-1000000")
    assert run_of(tmp_path) == {"recipe": "1000000"}
    assert [step for step, _ in training_states(tmp_path / "short")] == [2]
    assert newest_state(tmp_path / "nothing") is None


def test_a_checkpoint_passes_on_what_it_learned_from(tmp_path):
    asked = TrainedVqa("q", "all", 0.1, 448)
    write_state(tmp_path / "first", 3, **run_from(0.2, 0, vqa=to_json(asked)))
    write_state(tmp_path / "second", 3, **run_from(0.3, 1), **ancestry(tmp_path / "first"))
    write_state(tmp_path / "third", 3, **run_from(0.1, 0, "e"), **ancestry(tmp_path / "second"))
    wanted = (TrainedOn("d", 0.2, 0, asked), TrainedOn("d", 0.3, 1), TrainedOn("e", 0.1, 0))
    assert trained_on(tmp_path / "third") == wanted
    assert trained_on(tmp_path / "published") == ()
    assert ancestry(tmp_path / "published") == {}


def test_new_episodes_are_those_that_every_training_on_the_data_set_held_out(dataset):
    """A rater trained with another seed has learned from what its policy's training held out."""
    held = [set(split_episodes(dataset, 0.4, seed)[1]) for seed in (0, 1)]
    assert held[0] != held[1]
    trained = [TrainedOn(dataset.fingerprint, 0.4, seed) for seed in (0, 1)]
    assert set(new_episodes(dataset, trained[:1])) == held[0]
    assert set(new_episodes(dataset, trained)) == held[0] & held[1]
    assert new_episodes(dataset, [TrainedOn("another", 0.4, 0)]) == tuple(range(len(dataset.episodes)))
