"""Recording: alignment, reproducibility, what is kept."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from tests.data.toyset import full_disk
from tests.simulators.test_checker import Reusing
from vlaflow.cli.record import main
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError, DataError
from vlaflow.simulators import make
from vlaflow.simulators.experts import Noise, Noisy, episode_generator, expert_for, noises
from vlaflow.simulators.obstacle import ObstacleEnv
from vlaflow.simulators.record import RecordConfig, episode_seed, record

ENVS = ("metaworld/window-close-v3", "metaworld/button-press-topdown-v3")


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("record") / "one"
    summary = record(RecordConfig(ENVS, episodes=1, size=48, noise=(Noise(0.2),)), root, workers=0)
    return root, summary


@pytest.mark.parametrize("module", ["simulators.record", "simulators.record_vqa", "cli.demo"])
def test_what_records_loads_no_torch(module):
    """Every worker is a new interpreter, and loading torch takes seconds and memory for nothing."""
    code = f"import sys, vlaflow.{module}; raise SystemExit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_any_number_of_workers_gives_the_same_bytes(recorded, tmp_path):
    """Every file, to the byte."""
    root, _ = recorded
    record(RecordConfig(ENVS, episodes=1, size=48, noise=(Noise(0.2),)), tmp_path / "two", workers=2)
    assert digests(root) == digests(tmp_path / "two")
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_frame_state_and_label_belong_together(recorded):
    """Playing the recorded seed again shows, at each frame, the stored state, image and clean expert action."""
    root, summary = recorded
    dataset = Dataset.open(root)
    assert (len(dataset.episodes), len(dataset)) == (summary.episodes, summary.frames)
    rows = dataset.episode_slice(0)
    columns = dataset.columns()
    states, actions = columns.state[rows], columns.action[rows]
    frames = dataset.frames(0, "image")
    env, expert = make(ENVS[0], size=48), expert_for(ENVS[0])
    env.restart(episode_seed(0, 0, 0))
    noisy = Noisy(expert, Noise(0.2), episode_generator(ENVS[0], episode_seed(0, 0, 0)), np.array([0, 0, 0, 1], bool))
    pictures = []
    for state, action, given in zip(states, actions, columns.executed[rows], strict=True):
        assert np.array_equal(state, env.state)
        assert np.array_equal(action, expert(env))
        assert np.abs(action).max() <= 1
        pictures.append(env.render().astype(int))
        executed = noisy(env)[0]
        assert np.array_equal(given, executed)
        env.advance(executed)
    here, shifted = np.abs(frames - pictures).mean(), np.abs(frames[1:] - np.stack(pictures[:-1])).mean()
    assert here < shifted  # H.264 loses some, a frame too early or too late loses more
    assert here < np.abs(frames[:-1] - np.stack(pictures[1:])).mean()
    assert dataset.episodes[0].task == "Push and close a window"


def test_noise_is_executed_and_not_learned(recorded, tmp_path):
    """With and without noise the first labels agree and the next states do not."""
    record(RecordConfig(ENVS[:1], episodes=1, size=48, noise=(Noise(0.0),)), tmp_path / "clean", workers=0)
    noisy, clean = (Dataset.open(p).columns() for p in (recorded[0], tmp_path / "clean"))
    assert np.array_equal(noisy.action[0], clean.action[0])
    assert not np.array_equal(noisy.state[1], clean.state[1])


def test_episodes_take_turns_among_several_kinds_of_noise(tmp_path):
    """Each episode is, to the bit, that of a recording with its noise alone."""
    kinds = noises([0.0, 0.3], [0.0, 0.8])
    for name, noise in (("both", kinds), ("first", kinds[:1]), ("second", kinds[1:])):
        record(RecordConfig(ENVS[:1], episodes=3, size=16, noise=noise), tmp_path / name, workers=0)
    sets = {path.name: Dataset.open(path) for path in tmp_path.iterdir()}
    assert [kind["memory"] for kind in sets["both"].provenance["noise"]] == [0.0, 0.8]
    for episode, alone in enumerate(("first", "second", "first")):
        expected, given = (sets[name].columns().executed[sets[name].episode_slice(episode)] for name in (alone, "both"))
        assert np.array_equal(expected, given)
    assert not np.array_equal(*(sets[name].columns().executed[:9] for name in ("first", "second")))


def test_an_episode_ends_a_few_frames_after_success(tmp_path):
    """Exactly `after_success` more frames follow the successful step."""
    lengths = []
    for extra in (0, 5):
        record(
            RecordConfig(ENVS[:1], episodes=1, size=16, noise=(Noise(0),), after_success=extra),
            tmp_path / str(extra),
            workers=0,
        )
        lengths.append(len(Dataset.open(tmp_path / str(extra))))
    assert lengths[1] - lengths[0] == 5


def test_seeds_of_recordings_are_distinct_and_never_those_of_an_evaluation():
    """Evaluation uses 1000 + i."""
    seeds = [episode_seed(run, episode, attempt) for run in range(3) for episode in (0, 9_999) for attempt in (0, 98)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 10_000
    assert max(episode_seed(4000, 9_999, 98), 0) < 2**32


def test_an_expert_that_cannot_succeed_is_reported_and_leaves_nothing(tmp_path):
    """Three times the full range of noise is too much for anybody."""
    config = RecordConfig(("metaworld/peg-insert-side-v3",), episodes=1, size=16, noise=(Noise(3.0, gripper=3.0),), attempts=1)
    with pytest.raises(DataError, match="Use less noise"):
        record(config, tmp_path / "never", workers=0)
    assert not list(tmp_path.iterdir())


def test_an_episode_that_terminates_without_success_is_not_a_demonstration(tmp_path, monkeypatch):
    """gymnasium's environments terminate where they fail, too, and one of another package may: ``info`` says what happened."""

    class Losing(ObstacleEnv):
        def advance(self, action):
            reward, terminated, truncated, info = super().advance(action)
            return reward, terminated or truncated, truncated and info["steps"] == 50, info

    env = Losing("pass-v0", size=32)
    monkeypatch.setattr("vlaflow.simulators.record.cached", lambda *_, **__: env)
    monkeypatch.setattr("vlaflow.simulators.record.expert_for", lambda _: lambda env, error=None: np.array([0, 1], np.float32))
    with pytest.raises(DataError, match="failed with 2 seeds in a row"):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=32, noise=(Noise(0),), attempts=2), tmp_path / "x", 0)


def test_an_environment_that_draws_into_one_array_is_recorded_frame_by_frame(tmp_path, monkeypatch):
    """Its observations all share that array, so at the end of an episode each of them shows the last frame."""
    config = RecordConfig(("obstacle/pass-v0",), episodes=1, size=32)
    record(config, tmp_path / "own", 0)
    env = Reusing("pass-v0", size=32)
    monkeypatch.setattr("vlaflow.simulators.record.cached", lambda *_, **__: env)
    record(config, tmp_path / "shared", 0)
    assert digests(tmp_path / "shared") == digests(tmp_path / "own")


def test_images_of_another_size_than_asked_for_are_refused(tmp_path, monkeypatch):
    """An environment of another package may have a camera of a fixed size, with which the command can be repeated."""
    env = ObstacleEnv("pass-v0", size=32)
    monkeypatch.setattr("vlaflow.simulators.record.cached", lambda *_, **__: env)
    with pytest.raises(
        ConfigError, match=r"obstacle/pass-v0 renders 'above' with 32x32 pixels, not 64x64\. Record .* --size 32"
    ):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=64), tmp_path / "x", 0)


@pytest.mark.parametrize("sides", [(24, 32), (33, 33)])
def test_a_camera_that_no_size_suits_is_told_so(sides, tmp_path, monkeypatch):
    """Neither side of an oblong image, nor an odd one, is a size to repeat the command with."""

    class Fixed(ObstacleEnv):
        @property
        def views(self):
            return {self.view: sides}

    monkeypatch.setattr("vlaflow.simulators.record.cached", lambda *_, **__: Fixed("pass-v0", size=32))
    with pytest.raises(ConfigError, match=r"not 64x64\. Let its suite's build render every view as a square"):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=64), tmp_path / "x", 0)


def test_an_expert_that_fails_undisturbed_is_not_said_to_need_less_noise(tmp_path, monkeypatch):
    monkeypatch.setattr("vlaflow.simulators.record.expert_for", lambda _: lambda env, error=None: np.zeros(2))
    with pytest.raises(DataError, match="Correct the expert"):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=32, noise=(Noise(0),), attempts=1), tmp_path / "x", 0)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_an_impossible_size_is_refused_without_the_advice_to_take_another_impossible_one(size, tmp_path):
    with pytest.raises(ConfigError, match=rf"between 8 and 2048 pixels wide, got {size}\.$"):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=size), tmp_path / "x", 0)


def test_an_odd_size_is_refused_before_anything_is_played(tmp_path):
    """Videos need an even one."""
    with pytest.raises(ConfigError, match=r"even.* 33.* --size 32 or 34"):
        record(RecordConfig(("obstacle/pass-v0",), episodes=1, size=33), tmp_path / "x", 0)


def test_an_existing_folder_is_not_overwritten(recorded):
    """Nobody loses a recording by repeating a command."""
    with pytest.raises(DataError, match="exists already"):
        record(RecordConfig(ENVS, episodes=1), recorded[0], workers=0)


def test_a_place_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created .* Choose another --out"):
        record(RecordConfig(ENVS, episodes=1), tmp_path / "file/deeper/set", workers=0)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(recorded, tmp_path):
    with full_disk(), pytest.raises(DataError, match=r"could not be written to .*too large.* Make room"):
        record(RecordConfig(ENVS[:1], episodes=1, size=48), tmp_path / "set", workers=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"envs": ()},
        {"episodes": 0},
        {"seed": -1},
        {"attempts": 0},
        {"noise": ()},
        {"episodes": 1, "noise": (Noise(), Noise(0.2))},
    ],
)
def test_an_impossible_config_is_refused(wrong):
    """Before anything is built."""
    with pytest.raises(ConfigError):
        RecordConfig(**{"envs": ENVS} | wrong)


def test_the_command_records(tmp_path, capsys):
    """As a user would type it."""
    arguments = f"--env {ENVS[0]} --env {ENVS[1]} --episodes 1 --size 16 --workers 0 --out {tmp_path / 'd'}"
    assert main(arguments.split()) == 0
    assert len(Dataset.open(tmp_path / "d").episodes) == 2
    assert "2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ("", [(0.1, 0.0)]),
        ("--noise 0.3", [(0.3, 0.0)]),
        ("--noise 0.1 --noise-memory 0 --noise 0.2 --noise-memory 0.8", [(0.1, 0.0), (0.2, 0.8)]),
    ],
)
def test_the_noise_that_is_typed_takes_the_place_of_the_default(tmp_path, options, recorded):
    """It is noted in the data set."""
    arguments = f"--env {ENVS[0]} --episodes 2 --size 16 --workers 0 --out {tmp_path / 'd'} {options}"
    assert main(arguments.split()) == 0
    assert [(kind["scale"], kind["memory"]) for kind in Dataset.open(tmp_path / "d").provenance["noise"]] == recorded
