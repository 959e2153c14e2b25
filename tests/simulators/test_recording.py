"""Interrupted recordings: what is kept, what is recorded again, what is refused."""

import os
import signal
from dataclasses import replace

import pytest

from tests.crashes.faults import attempt
from tests.data.toyset import full_disk
from tests.simulators.test_record import digests
from vlaflow.cli.record import main
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError, DataError
from vlaflow.simulators.obstacle_task import SPEC as OBSTACLE
from vlaflow.simulators.record import RecordConfig, episode_jobs, record
from vlaflow.simulators.recording import Recording, RecordJob, episodes_folder, finished_before

CONFIG = RecordConfig(("obstacle/pass-v0",), episodes=4, size=32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a recording without interruption."""
    out = tmp_path_factory.mktemp("whole") / "set"
    record(CONFIG, out, workers=0)
    return digests(out)


def interrupt(out, after, config=CONFIG):
    """Record, and press Ctrl-C after so many episodes."""
    seen = []

    def stop(demo):
        seen.append(demo)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(config, out, workers=0, finished=stop)
    return len(seen)


def test_an_interrupted_recording_continues_and_has_the_same_bytes(tmp_path, whole):
    out, seen = tmp_path / "set", []
    interrupt(out, 3)
    assert finished_before(out, episode_jobs(CONFIG)) == 3
    record(CONFIG, out, workers=0, finished=seen.append)
    assert len(seen) == 1
    assert digests(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_episode_whose_files_are_not_whole_is_recorded_again(tmp_path, whole):
    """As a kill in the middle of an episode, or a power cut, leaves them."""
    out, seen = tmp_path / "set", []
    interrupt(out, 3)
    one, two = sorted(episodes_folder(out).glob("*.mp4"))[:2]
    one.write_bytes(one.read_bytes()[:100])
    two.with_name(two.name.replace("-above.mp4", ".npz")).write_bytes(b"PK")
    record(CONFIG, out, workers=0, finished=seen.append)
    assert len(seen) == 3
    assert digests(out) == whole


def test_more_episodes_of_an_unfinished_recording_need_no_repetition(tmp_path):
    """An episode depends on its own number, not on how many there are."""
    out, seen = tmp_path / "set", []
    interrupt(out, 2, RecordConfig(CONFIG.envs, episodes=2, size=32))
    record(CONFIG, out, workers=0, finished=seen.append)
    assert (len(seen), len(Dataset.open(out).episodes)) == (2, 4)


def test_an_unfinished_recording_with_other_settings_is_refused(tmp_path):
    out = tmp_path / "set"
    interrupt(out, 1)
    with pytest.raises(ConfigError, match=r"1 episodes .* with size = 32, not 48\. Repeat its command"):
        record(RecordConfig(CONFIG.envs, episodes=4, size=48), out, workers=0)
    assert finished_before(out, episode_jobs(CONFIG)) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tasks": {"pass-v0": "Move to the goal"}}, r"suite\.tasks\.pass-v0 = Move the .*, not Move to the goal\."),
        ({"state_names": ("x", "y")}, r"suite\.state_names\[0\] = hand_x, not x\."),
        ({"views": ("top", "side")}, r"suite\.views = \['above'\], not \['top', 'side'\]\."),
        ({"action": replace(OBSTACLE.action, rate_hz=20)}, r"suite\.action\.rate_hz = 10, not 20\."),
    ],
)
def test_an_unfinished_recording_of_a_suite_that_changed_is_refused(change, named, tmp_path, monkeypatch):
    """Its episodes would have two instructions, or numbers that mean two things."""
    out = tmp_path / "set"
    interrupt(out, 1)
    monkeypatch.setattr("vlaflow.simulators.record.simulator_spec", lambda _: replace(OBSTACLE, **change))
    with pytest.raises(ConfigError, match=named):
        record(CONFIG, out, workers=0)


def test_the_package_of_a_suite_is_recorded_and_its_update_refused(tmp_path, monkeypatch):
    out = tmp_path / "set"
    package = {"mine": "1.0"}
    monkeypatch.setattr("vlaflow.simulators.record.suite_package", lambda _: dict(package))
    interrupt(out, 1)
    package["mine"] = "2.0"
    with pytest.raises(ConfigError, match=r"versions\.mine = 1\.0, not 2\.0"):
        record(CONFIG, out, workers=0)
    package["mine"] = "1.0"
    record(CONFIG, out, workers=0)
    assert Dataset.open(out).provenance["versions"]["mine"] == "1.0"


def test_environments_with_similar_names_have_files_of_their_own():
    """An episode of one would be taken for the other's."""
    names = ("suite/a/b", "suite/a_b", "suite/a%2Fb")
    assert len({RecordJob(name, 0).stem for name in names}) == len(names)


def test_two_recordings_of_one_data_set_at_once_are_refused(tmp_path):
    out = tmp_path / "set"
    with Recording(out, {}), pytest.raises(ConfigError, match="Another process is recording"):
        record(CONFIG, out, workers=0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_finished_episodes(tmp_path, whole):
    out = tmp_path / "set"
    interrupt(out, 2)
    with full_disk(), pytest.raises(DataError, match="finished episodes are kept"):
        record(CONFIG, out, workers=0)
    assert finished_before(out, episode_jobs(CONFIG)) == 2
    record(CONFIG, out, workers=0)
    assert digests(out) == whole


def test_a_killed_recording_keeps_its_episodes(tmp_path, whole):
    """SIGKILL of everything, so nothing is tidied up; the partial data set that it leaves is not looked at."""
    out = tmp_path / "set"
    assert attempt(lambda: _record_and_die(out), tmp_path).status == -signal.SIGKILL
    assert finished_before(out, episode_jobs(CONFIG)) == 2
    record(CONFIG, out, workers=0)
    assert digests(out) == whole


def _record_and_die(out):
    seen = []

    def die(demo):
        seen.append(demo)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    record(CONFIG, out, workers=0, finished=die)


def test_the_command_says_how_often_the_experts_succeed(tmp_path, capsys):
    out = tmp_path / "set"
    interrupt(out, 3)
    arguments = f"--env obstacle/pass-v0 --episodes 4 --size 32 --workers 0 --out {out}"
    assert main(arguments.split()) == 0
    said = capsys.readouterr()
    assert "The experts succeeded in 4 of 4 attempts (100.0%)" in said.out
    assert "3 episodes done before: 1/1" in said.err
