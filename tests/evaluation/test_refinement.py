"""Calibrating a refinement: what limits do, what the table may show, and where a calibration is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.conftest import make_policy
from vlaflow.cli.calibrate import main
from vlaflow.compute.doubt_calibration import RefineCalibration, RefineRisk, RefineShare, Rival
from vlaflow.compute.doubt_limits import limit_for_risk, limit_for_share
from vlaflow.compute.doubts import AtRandom, Spread
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import Refine
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.data.lerobot import Dataset
from vlaflow.data.writer import Writer
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.evaluation import refinement
from vlaflow.evaluation.calibrate import sample
from vlaflow.evaluation.rank import auc, auc_interval, rank_correlation
from vlaflow.evaluation.refinement_measures import ORACLE, RATER, Workbench
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.provenance import fingerprint
from vlaflow.simulators.base import simulator_spec

seeds = st.integers(0, 2**31)
FRAMES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four episodes of noise, as Meta-World would record them."""
    spec, root = simulator_spec("metaworld"), tmp_path_factory.mktemp("refinement") / "dataset"
    settings = {"fps": 80, "action_spec": spec.action, "state_names": spec.state_names, "robot_type": "test", "provenance": {}}
    with Writer(root, views={"image": (32, 32)}, **settings) as writer:
        for episode in range(4):
            rng = np.random.default_rng(episode)
            images = rng.integers(0, 256, (14, 32, 32, 3), np.uint8)
            state, action = rng.normal(size=(14, 4)).astype(np.float32), rng.uniform(-1, 1, (14, 4)).astype(np.float32)
            writer.add({"image": images}, state, action, "Open a drawer")
    return root


@pytest.fixture(scope="module")
def calibrated(checkpoint, dataset, tmp_path_factory):
    """A checkpoint with a calibration of half of the executed actions, and what the command printed."""
    folder = tmp_path_factory.mktemp("refinement") / "policy"
    shutil.copytree(checkpoint, folder)
    given = [str(folder), "--dataset", str(dataset), "--episodes", "all", "--frames", str(FRAMES)]
    assert main([*given, "--refine", "--share", "0.5", "--compute", "dense:2", "--sampling", "1", "--clock", "0.75"]) == 0
    return folder


@pytest.fixture(scope="module")
def bench(dataset):
    policy = make_policy()
    frames = sample(policy, Dataset.open(dataset), range(4), FRAMES)
    refine = Refine(AtRandom(), Sampling(1), parse("dense:2"), executed=4)
    work = Workbench(policy, frames, refine, {RATER: parse("refine").doubt, "random": AtRandom()})
    return work, work.drafts()


@given(seed=seeds, share=st.floats(0, 1), count=st.integers(1, 60))
def test_the_limit_of_a_share_doubts_that_share_within_one_action(seed, share, count):
    score_M = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    assert abs(int((score_M > limit_for_share(score_M, share)).sum()) - share * count) <= 1


def test_of_equal_scores_at_the_limit_none_is_doubted():
    assert int((np.ones(8) > limit_for_share(np.ones(8), 0.5)).sum()) == 0


@settings(max_examples=8)
@given(seed=seeds, risk=st.floats(0.05, 0.6))
def test_a_bound_on_the_risk_holds_on_other_chunks(seed, risk):
    """Scores that know half of the error; the bound may fail in 5 % of the draws, so this allows a standard error more."""
    random = np.random.default_rng(seed)
    error_NL = random.gamma(2, size=(1200, 3))
    score_NL = error_NL + random.gamma(2, size=(1200, 3))
    counts_NL, tuning_N = random.random((1200, 3)) < 0.9, np.arange(1200) % 4 == 0
    own = slice(0, 600)
    limit = limit_for_risk(
        score_NL[own], error_NL[own], counts_NL[own], max_error=3.0, risk=risk, error=0.001, tuning_N=tuning_N[own]
    )
    bad = (counts_NL & (score_NL <= limit) & (error_NL > 3.0))[600:].any(1).mean()
    assert bad <= risk + 3 * np.sqrt(risk * (1 - risk) / 600)


def test_without_allowed_errors_everything_is_doubted():
    score_NL, everything = np.random.default_rng(0).random((40, 2)), np.ones((40, 2), bool)
    limit = limit_for_risk(score_NL, np.ones((40, 2)), everything, max_error=0.5, risk=0.1, tuning_N=np.arange(40) % 2 == 0)
    assert (score_NL > limit).all()


@given(seed=seeds)
def test_ranks_know_order_and_nothing_else(seed):
    random = np.random.default_rng(seed)
    value_M, other_M = random.normal(size=30), random.normal(size=30)
    assert rank_correlation(value_M, np.exp(value_M)) == pytest.approx(1)
    assert rank_correlation(value_M, -value_M) == pytest.approx(-1)
    assert rank_correlation(value_M, np.ones(30)) == 0
    positive_M = other_M > 0
    pairs = [(a > b) + 0.5 * (a == b) for a in value_M[positive_M] for b in value_M[~positive_M]]
    assert auc(value_M, positive_M) == pytest.approx(np.mean(pairs) if pairs else 0.5)
    low, high = auc_interval(auc(value_M, positive_M), int(positive_M.sum()), int((~positive_M).sum()))
    assert 0 <= low <= auc(value_M, positive_M) <= high <= 1


def test_an_area_under_the_curve_has_an_interval_even_if_all_pairs_are_in_order():
    for positives in (5, 50):
        low, high = auc_interval(1.0, positives, positives)
        assert low < 1 - 1 / (2 * positives)
        assert high == 1
        assert (low, high) == pytest.approx(tuple(1 - end for end in reversed(auc_interval(0.0, positives, positives))))


def test_the_interval_of_an_area_holds_the_truth_as_often_as_it_says():
    """Two normal scores whose means differ so that 85 of 100 pairs are in order."""
    random, positives, negatives, true = np.random.default_rng(0), 12, 20, 0.85
    positive_M, shift = np.arange(positives + negatives) < positives, 2**0.5 * 1.0364
    held = 0
    for _ in range(600):
        score_M = random.normal(size=len(positive_M)) + shift * positive_M
        low, high = auc_interval(auc(score_M, positive_M), positives, negatives)
        held += low <= true <= high
    assert 0.92 < held / 600 < 0.98


def test_a_calibration_says_what_was_measured_and_runs_by_its_name(calibrated):
    made = RefineCalibration.load(calibrated / "calibration/refine/share-0.5.json")
    assert made.target == RefineShare(0.5)
    assert (made.first, made.sampling, made.n_action_steps) == ("dense:2", Sampling(1), 4)
    assert {each.doubt for each in made.knowledge} == {"rater", "spread", "random"}
    assert made.rivals[0].difference == 0
    shares = {each.name: each.share for each in made.rivals if each.settings}
    assert shares["all actions"] == 1
    timed = {each.settings for each in made.rivals if each.name == "rater, calibrated" and each.p50}
    assert timed == {"1, clock 0.75"}, "what was asked for is in the table, whatever its clock"
    compute = parse("refine:share-0.5", checkpoint=Checkpoint(calibrated, fingerprint(calibrated)))
    assert (compute.name, compute.executed, compute.doubt.threshold) == ("refine:share-0.5", 4, made.threshold)
    unstated = replace(made, first="dense").refine("again", Knobs(steps=3))
    assert unstated.inner.sampling == Sampling(10)  # what "dense" was when it was measured
    page = (calibrated / "calibration/refine/share-0.5.html").read_text()
    assert page.count("<svg") == 2
    assert made.checkpoint in page


def test_a_risk_is_written_with_what_other_episodes_show(calibrated, dataset, monkeypatch, capsys):
    """No action may be kept that is further off than 0, so all are regenerated and none is wrong."""
    monkeypatch.setattr(refinement, "rivals", lambda *_: iter([Rival("dense:2", "", 0, 1, 0, 0, 0)]))
    given = [str(calibrated), "--dataset", str(dataset), "--episodes", "all", "--frames", str(FRAMES), "--refine"]
    assert main([*given, "--max-deviation", "0", "--doubt", "spread", "--draws", "2", "--compute", "dense:2"]) == 0
    made = RefineCalibration.load(calibrated / "calibration/refine/spread-deviation-0.json")
    assert made.target == RefineRisk(0, pytest.approx(0.1), 0.05)
    assert (made.effect.share, made.effect.above, made.draws) == (1, 0, 2)
    assert "keep an action that is worse than allowed" in capsys.readouterr().out


def test_other_weights_and_another_data_set_are_refused(calibrated, dataset, tmp_path):
    with pytest.raises(CalibrationError, match="was made for checkpoint"):
        parse("refine:share-0.5", checkpoint=Checkpoint(calibrated, "another"))
    with pytest.raises(CalibrationError, match=r"share-0\.5"):
        parse("refine:share-0.4", checkpoint=Checkpoint(calibrated, "another"))
    with pytest.raises(ConfigError, match="brings its first round along"):
        parse("refine:share-0.5+dense", checkpoint=Checkpoint(calibrated, "another"))
    other = tmp_path / "policy"
    shutil.copytree(calibrated, other)
    file = other / "calibration/refine/share-0.5.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dataset": "another"}))
    given = [str(other), "--dataset", str(dataset), "--episodes", "all", "--frames", "8", "--refine"]
    with pytest.raises(CalibrationError, match="was made on data set another"):
        main([*given, "--share", "0.5", "--compute", "dense:2"])


def test_the_threshold_regenerates_its_share_of_the_actions_it_was_made_from(bench):
    _, drafts = bench
    for name in (RATER, ORACLE):
        score_M = drafts.score_NL[name][drafts.counts_NL]
        doubted = (score_M > limit_for_share(score_M, 0.3)).sum()
        assert abs(int(doubted) - 0.3 * len(score_M)) <= 1


def test_only_doubted_actions_change_and_all_rivals_have_the_same_noise(bench):
    work, drafts = bench
    nothing, everything = np.zeros_like(drafts.counts_NL), np.ones_like(drafts.counts_NL)
    np.testing.assert_array_equal(work.regenerated(nothing, work.refine), drafts.error_NL)
    first, second = (work.regenerated(everything, work.refine) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != drafts.error_NL).all()


def test_the_oracle_is_no_worse_than_random_doubt(bench):
    """A second draw has the same expected error whatever the first was, so replacing the worst ones replaces more."""
    work, drafts = bench
    errors = {}
    for name in (ORACLE, "random"):
        score_NL = drafts.score_NL[name]
        doubted_NL = drafts.counts_NL & (score_NL > limit_for_share(score_NL[drafts.counts_NL], 0.5))
        errors[name] = work.regenerated(doubted_NL, work.refine)[drafts.counts_NL].mean()
    assert errors[ORACLE] < errors["random"]


def test_what_cannot_be_calibrated_is_one_sentence(calibrated, bare_checkpoint, dataset, monkeypatch):
    def refused(folder, *arguments):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            main([str(folder), "--dataset", str(dataset), "--episodes", "all", *arguments])
        return str(caught.value)

    assert "train asyncvla.rater" in refused(bare_checkpoint, "--refine")
    assert "add --refine" in refused(calibrated, "--share", "0.5")
    assert "Give either --share or --max-deviation" in refused(calibrated, "--refine", "--share", "1", "--max-deviation", "1")
    assert "begins with a letter" in refused(calibrated, "--refine", "--name", "2x")
    monkeypatch.setattr(refinement.Workbench, "drafts", None)
    twice = ("--refine", "--name", "twice", "--compute", "refine-random:2+dense:5")
    assert "begins with a sampler, as in --compute dense:2 or mean:4" in refused(calibrated, *twice)
    again = ("--refine", "--name", "share-0.5", "--compute", "dense:2", "--sampling", "1", "--share", "0.5", "--clock")
    assert "made with clock 0.75, and this would replace it by one with 0.5" in refused(calibrated, *again, "0.5")
    again = (*again[:-2], "0.25", "--clock", "0.75")
    assert "made with share 0.5, and this would replace it by one with 0.25" in refused(calibrated, *again)
    with pytest.raises(ConfigError, match="at least two draws"):
        parse("refine-spread:2,draws=1")
    assert replace(Spread(0.1), threshold=0.2).limit == 0.2
