"""An evaluation that is interrupted loses nothing that was finished, and what cannot be written is said before any episode."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest

import vlaflow
from tests.evaluation.conftest import CONFIG, ENV, untimed
from vlaflow.cli.main import main
from vlaflow.compute.spelling import Knobs
from vlaflow.errors import ConfigError, DataError
from vlaflow.evaluation import prepared
from vlaflow.evaluation import run as module
from vlaflow.evaluation.config import EvaluationConfig
from vlaflow.evaluation.episode_log import FILE, EpisodeLog
from vlaflow.evaluation.prepared import RESULTS
from vlaflow.evaluation.rollout import RolloutConfig
from vlaflow.evaluation.run import run
from vlaflow.policies.recipe import Base


@dataclass(frozen=True)
class Made:
    """An episode of a test."""

    name: str
    steps: tuple[int, ...] = ()


def lines(folder):
    return (folder / FILE).read_bytes().splitlines()


def interrupted(checkpoint, out, monkeypatch, episodes):
    """Ctrl-C when that many episodes have been kept."""
    add = EpisodeLog.add

    def and_stop(self, number, episode):
        add(self, number, episode)
        if len(self.finished) == episodes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeLog, "add", and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, CONFIG, out)


@pytest.mark.parametrize(("finished", "left"), [(2, 6), (3, 6)], ids=["a block", "half of another"])
def test_an_interrupted_evaluation_continues_to_the_same_results(checkpoint, whole, tmp_path, monkeypatch, finished, left):
    """A block of two episodes is played together, so the second one is played again with both."""
    interrupted(checkpoint, tmp_path, monkeypatch, finished)
    assert len(lines(tmp_path)) == 1 + finished
    assert not (tmp_path / RESULTS).exists()
    played, play_all = [], prepared.play_all

    def counted(folder, jobs, *given, **settings):
        played.extend(jobs)
        return play_all(folder, jobs, *given, **settings)

    monkeypatch.setattr(prepared, "play_all", counted)
    run(checkpoint, CONFIG, tmp_path)
    assert len(played) == left
    assert untimed(tmp_path) == whole
    assert not (tmp_path / FILE).exists(), "the results hold everything; the next evaluation here begins from nothing"


def test_an_evaluation_continues_on_another_number_of_cores(checkpoint, whole, tmp_path, monkeypatch):
    """Every process computes with one thread, so the number of cores decides nothing about an episode."""
    with monkeypatch.context() as patch:
        patch.setattr("vlaflow.versions.os.sched_getaffinity", lambda process: set(range(77)))
        interrupted(checkpoint, tmp_path, patch, 2)
    run(checkpoint, CONFIG, tmp_path)
    assert untimed(tmp_path) == whole


def test_the_function_of_the_package_measures_what_its_arguments_say(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "run", lambda *given, **settings: asked.append((*given, settings)))
    vlaflow.evaluate(checkpoint, ENV, str(tmp_path))
    vlaflow.evaluate(checkpoint, [ENV], tmp_path, compute=("dense", "refine"), solver_steps=2, max_steps=12, fresh=True)
    other = EvaluationConfig((ENV,), ("dense", "refine"), knobs=Knobs(2), rollout=RolloutConfig(max_steps=12), workers=0)
    assert asked == [
        (checkpoint, EvaluationConfig((ENV,), workers=0), tmp_path, {"fresh": False}),
        (checkpoint, other, tmp_path, {"fresh": True}),
    ]


def test_a_killed_evaluation_continues_at_another_number_of_workers(checkpoint, whole, tmp_path):
    """SIGKILL gives no chance to tidy up; the workers end by themselves."""
    words = [
        "--env",
        ENV,
        "--compute",
        "dense",
        "--compute",
        "refine",
        "--compute",
        "refine-random",
        "--episodes",
        "2",
        "--steps",
        "2",
        "--no-videos",
    ]
    words += ["--max-steps", "12", "--language", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "vlaflow", "eval", str(checkpoint), *words, "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / FILE).exists() and len(lines(tmp_path)) > 1:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(lines(tmp_path)) > 1
    run(checkpoint, CONFIG, tmp_path)
    assert untimed(tmp_path) == whole


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_bytes(checkpoint, whole, tmp_path, workers):
    """Noise is a function of seed and chunk number, workers compute with one thread, and episodes are not timed."""
    run(checkpoint, replace(CONFIG, workers=workers), tmp_path)
    assert untimed(tmp_path) == whole


def test_a_line_that_a_kill_left_unfinished_is_played_again(checkpoint, whole, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path, monkeypatch, 3)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:-20])
    run(checkpoint, CONFIG, tmp_path)
    assert untimed(tmp_path) == whole


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"episodes": 3}, "episodes = 2, not 3"),
        ({"first_seed": 7}, "first_seed = 1000, not 7"),
        ({"knobs": Knobs(3)}, "computes = "),
        ({"rollout": RolloutConfig(max_steps=11)}, "rollout = "),
    ],
)
def test_other_settings_are_refused_in_a_sentence_and_their_episodes_kept(checkpoint, tmp_path, monkeypatch, changes, what):
    interrupted(checkpoint, tmp_path, monkeypatch, 1)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ConfigError, match=what) as caught:
        run(checkpoint, replace(CONFIG, **changes), tmp_path)
    assert "--fresh" in str(caught.value)
    assert "another --out" in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_checkpoint_of_the_hub_is_recorded_with_its_commit(checkpoint, tmp_path):
    commit = "0123456789" * 4
    folder = shutil.copytree(checkpoint, tmp_path / f"models--user--a--policy/snapshots/{commit}")
    assert prepared.prepare(folder, CONFIG).checkpoint == f"hf://user/a--policy@{commit}"
    assert Base.open(folder).identity()["policy_source"] == f"hf://user/a--policy@{commit}"
    assert "policy_source" not in Base.open(checkpoint).identity()


def test_fresh_discards_an_unfinished_evaluation(checkpoint, tmp_path, monkeypatch):
    interrupted(checkpoint, tmp_path, monkeypatch, 1)
    other = replace(CONFIG, computes=("dense",), episodes=1)
    assert run(checkpoint, other, tmp_path, fresh=True).computes == ("dense",)


@pytest.mark.parametrize("place", ["taken/out", "taken", "folder/results.json", "folder/videos"])
def test_an_unusable_out_is_one_sentence_before_any_episode(checkpoint, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(prepared, "play_all", lambda *given, **settings: pytest.fail("an episode was played"))
    out = tmp_path / place
    if place == "folder/results.json":
        out.mkdir(parents=True)
    if place == "folder/videos":
        out.parent.mkdir()
        out.write_text("a file")
    out = out.parent if place.startswith("folder") else out
    assert main(["eval", str(checkpoint), "--env", ENV, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "Choose another --out." in said
    assert said.count("\n") == 1


def opened(folder, **settings):
    return EpisodeLog(folder, Made, {"seeds": (1, 2)} | settings)


def test_a_full_disk_is_one_sentence_and_loses_no_finished_episode(tmp_path):
    with opened(tmp_path) as log:
        log.add(0, Made("first"))
        size, before = log.file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        try:
            with pytest.raises(DataError, match=r"kept in episodes\.jsonl\. Make room"):
                log.add(1, Made("second"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        assert log.file.stat().st_size == size, "no half a line is left"
    with opened(tmp_path) as log:
        assert log.finished == {0: Made("first")}


@pytest.mark.parametrize("function", ["open", "ftruncate", "unlink"])
def test_a_disk_that_is_read_only_from_some_moment_on_is_one_sentence(tmp_path, monkeypatch, function):
    """Before the log is opened, begun or removed."""
    real = getattr(os, function)

    def refused(path, *more, **settings):
        if "part" in str(path):  # the proof that the folder can be written
            return real(path, *more, **settings)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, function, refused)
    with pytest.raises(DataError, match=r"could not be written to .* \(Read-only file system\); the episodes .* are kept"):
        opened(tmp_path).remove()


def test_two_evaluations_do_not_write_into_one_folder(tmp_path):
    with opened(tmp_path), pytest.raises(ConfigError, match="Another evaluation is writing"):
        opened(tmp_path)
    opened(tmp_path).__exit__(None, None, None)


def test_a_file_of_another_kind_is_never_overwritten(tmp_path):
    """LeRobot v2.1 has a file of the same name in meta/."""
    (tmp_path / FILE).write_text('{"episode_index": 0, "length": 5}\n')
    with pytest.raises(ConfigError, match="is not the log of an evaluation"):
        EpisodeLog(tmp_path, Made, {}, fresh=True)
    assert "episode_index" in (tmp_path / FILE).read_text()


def test_damage_in_the_middle_is_one_sentence(tmp_path):
    with opened(tmp_path) as log:
        for number in range(2):
            log.add(number, Made("x"))
    first, second, third = lines(tmp_path)
    (tmp_path / FILE).write_bytes(b"\n".join([first, second[:9], third, b""]))
    with pytest.raises(DataError, match=r"damaged .*--fresh"):
        opened(tmp_path)


def test_a_log_without_episodes_holds_nothing_up(tmp_path):
    opened(tmp_path).__exit__(None, None, None)
    with opened(tmp_path, seeds=(3,)) as log:
        assert log.finished == {}


def test_time_spent_before_counts(tmp_path):
    with opened(tmp_path) as log:
        log.seconds = 60.0
        log.add(3, Made("slow", (1, 2)))
    with opened(tmp_path) as log:
        assert log.spent >= 60
        assert log.finished == {3: Made("slow", (1, 2))}
        assert os.fstat(log._place).st_size == log.file.stat().st_size
