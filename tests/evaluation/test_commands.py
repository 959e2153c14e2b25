"""The commands, from the outside."""

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.conftest import CONFIG, ENV, make_policy
from vlaflow.cli.main import main
from vlaflow.compute.parse import able
from vlaflow.errors import DataError
from vlaflow.evaluation import results
from vlaflow.evaluation.check_policy import check_policy
from vlaflow.evaluation.prepared import prepare
from vlaflow.policies.base import Policy
from vlaflow.policies.seeds import recorded
from vlaflow.simulators.record import RecordConfig, episode_seed


@pytest.mark.usefixtures("few_timed")
def test_eval_writes_results_videos_and_a_report(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--env", ENV, "--compute", "dense", "--compute", "refine", "--episodes", "2", "--max-steps", "12", "--steps", "2"]
    assert main(["eval", str(checkpoint), *words, "--language", "1", "--workers", "0", "--out", str(out)]) == 0
    found = results.read(out / "results.json")
    assert [(e.compute, e.episodes, e.seeds, e.n_action_steps) for e in found.evaluations] == [
        ("dense", 2, (1000, 1001), 4),
        ("refine", 2, (1000, 1001), 4),
    ]
    assert [entry.condition for entry in found.language] == ["right", "other", "empty"]
    assert found.minutes.evaluate is not None
    assert found.minutes.train is None
    assert "no success in 12 steps" in (out / "report.html").read_text()
    assert len(list((out / "videos").glob("*.mp4"))) == 1
    printed = capsys.readouterr().out
    assert "0/2" in printed
    assert "refine against dense" in printed


@pytest.mark.usefixtures("few_timed")
def test_eval_plays_every_seed_with_every_noise_seed(checkpoint, tmp_path, capsys, monkeypatch):
    """The first noise seed gives the episodes of an evaluation without the option, and another number continues no log.

    Videos of an earlier evaluation in the same folder do not stay for the report.
    """
    words = ["eval", str(checkpoint), "--env", ENV, "--episodes", "2", "--max-steps", "8", "--steps", "2", "--workers", "0"]
    words += ["--no-videos", "--out", str(tmp_path)]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "videos.json").write_text("those of another policy")
    assert main(words) == 0
    assert not (tmp_path / "videos" / "videos.json").exists()
    plain = results.read(tmp_path / "results.json").evaluations[0]
    assert main([*words, "--noise-seeds", "2"]) == 0
    found = results.read(tmp_path / "results.json").evaluations[0]
    assert (found.seeds, found.noise_seeds) == ((1000, 1000, 1001, 1001), (0, 1, 0, 1))
    assert found.per_episode[::2] == plain.per_episode
    assert "4 episodes each, seeds 1000 to 1001, 2 noise seeds each" in " ".join(capsys.readouterr().out.split())

    def interrupted(*_):
        raise DataError("the disk is full")

    monkeypatch.setattr(results, "write", interrupted)
    assert main(words) == 2
    assert main([*words, "--noise-seeds", "2"]) == 2
    assert "noise_seeds = 1, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--env", ENV, "--compute", "refien"], "did you mean 'refine'"),
        (["--env", "metaworld/drawer-opn-v3"], "did you mean 'metaworld/drawer-open-v3'"),
        (["--env", ENV, "--n-action-steps", "99"], "chunks of 8 actions"),
        (["--env", ENV, "--episodes", "0"], "--episodes must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, capsys, tmp_path, words, answer):
    assert main(["eval", str(checkpoint), *words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert answer in said
    assert said.count("\n") == 1


def test_seeds_of_recordings_are_noticed(checkpoint, capsys):
    """An episode of the training says little about success, and no number of episodes may lead there in silence."""
    for seed, episodes, said in ((1000, 9000, False), (1000, 9001, True), (2_010_003, 1, True), (500_040, 2, False)):
        prepare(checkpoint, replace(CONFIG, first_seed=seed, episodes=episodes))
        assert ("Recordings use seeds from 10 000 on" in capsys.readouterr().err) == said
    for run in (0, 3):
        for attempt in (0, RecordConfig((ENV,), 1).attempts - 1):
            assert recorded(episode_seed(run, 7, attempt), 1)


def test_a_missing_checkpoint_is_one_sentence(capsys):
    assert main(["eval", "./nowhere", "--env", ENV]) == 2
    assert "There is no checkpoint folder nowhere" in capsys.readouterr().err


def test_a_sound_checkpoint_passes_its_check(checkpoint, bare_checkpoint, capsys):
    assert main(["check", "policy", str(checkpoint)]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    draws = ["dense", "mean:2", "medoid:2"]
    assert {f.compute for f in check_policy(bare_checkpoint)} == {"any", *draws, "refine-random", "refine-spread(mean:2)"}
    assert [c.name for c in able(make_policy(masks="synchronous").model)] == draws


def test_a_checkpoint_with_broken_numbers_fails_its_check(checkpoint, tmp_path, capsys):
    policy = Policy.from_pretrained(checkpoint)
    policy.model.decoder.codec.head[1].bias.data.fill_(3e38)
    policy.save_pretrained(tmp_path)
    assert main(["check", "policy", str(tmp_path)]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_a_policy_that_ignores_its_seed_fails_its_check(checkpoint, monkeypatch):
    act = Policy.act
    counter = iter(range(10**6))

    def restless(self, observation, compute=None, *, generator=None):
        answer = act(self, observation, compute, generator=generator)
        if isinstance(answer, list):
            return answer
        return replace(answer, actions=np.clip(answer.actions * 0 + next(counter) * 1e-4, -1, 1))

    monkeypatch.setattr(Policy, "act", restless)
    broken = {f.promise for f in check_policy(checkpoint) if not f.passed}
    assert "same seed, same bytes" in broken


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, _demo(out, workers=1)


def _demo(out, workers):
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--quick", "--out", str(out), "--workers", str(workers)]) == 0
    return printed.getvalue()


def test_the_demo_goes_from_nothing_to_a_report(demo):
    out, printed = demo
    found = results.read(out / "results.json")
    choice = json.loads((out / "rated" / "calibration" / "sampler.json").read_text())["choice"]
    assert found.computes == (choice, "dense", "refine", "exit:adaptive")
    assert None not in (found.minutes.record, found.minutes.train, found.minutes.rater, found.minutes.evaluate)
    page = (out / "report.html").read_text()
    assert "velocity error" in page
    assert "rating error" in page
    for command in (
        "vlaflow record",
        "vlaflow train asyncvla.demo",
        "vlaflow train asyncvla.rater",
        "vlaflow calibrate",
        "vlaflow eval",
    ):
        assert f"$ {command}" in printed
        assert command in page


def test_the_demo_repeats_nothing_and_continues_what_is_missing(demo):
    out, _ = demo
    before = results.read(out / "results.json")
    diary = json.loads((out / "demo.json").read_text())
    for step in ("rater", "calibrate", "evaluate"):
        diary["done"].remove(step)
    (out / "demo.json").write_text(json.dumps(diary))
    shutil.rmtree(out / "rated")
    assert _demo(out, workers=0).count("(done before)") == 2
    after = results.read(out / "results.json")
    assert after.fingerprint == before.fingerprint, "the same data, recipe and seed give the same rater"
    assert [e.per_episode for e in after.evaluations] == [e.per_episode for e in before.evaluations]


def test_a_folder_of_another_demo_is_refused(demo, tmp_path, capsys):
    out, _ = demo
    assert main(["demo", "--out", str(out)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "contains no demo" in capsys.readouterr().err
