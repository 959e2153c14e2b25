"""The choice of a sampler: one standard error, provenance, and what ``auto`` stands for."""

import os
from dataclasses import replace
from math import log

import pytest

from vlaflow.compute import sampler_choice
from vlaflow.compute.auto import calibrated, default_name
from vlaflow.compute.budget import Profile, choose_sampler, within
from vlaflow.compute.calibration import FOLDER, Calibration, ExitEffect, ShareTarget
from vlaflow.compute.cost import ChunkWork, CostModel, Work
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.compute.parse import parse
from vlaflow.compute.sampler_choice import FAILURES, FILE, Candidate, SamplerCalibration, choose
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.versions import processor


def candidate(compute, p50, score, error=0.0, **more):
    return Candidate(
        compute, nfe=1, layer_passes=p50, p50=p50, p99=2 * p50, score=score, behind=score - 0.3, standard_error=error, **more
    )


FOUND = (candidate("dense:1", 1, 0.5, 0.1), candidate("dense:2", 2, 0.31, 0.05), candidate("dense:10", 10, 0.3))
MADE = SamplerCalibration(
    checkpoint="aa",
    dataset="dd",
    criterion=FAILURES,
    candidates=FOUND,
    choice="dense:2",
    budget_ms=None,
    frames=64,
    envs=("metaworld/drawer-open-v3",),
    first_seed=500_000,
    seeds=40,
    two_groups=0.0,
    machine=processor(),
    device="cpu",
    threads=1,
    command="vlaflow calibrate",
    versions={"vlaflow": "0"},
)


@pytest.fixture
def checkpoint(tmp_path):
    MADE.save(tmp_path / FOLDER / FILE)
    return Checkpoint(tmp_path, "aa")


def test_the_cheapest_within_one_standard_error_of_the_best_is_chosen():
    assert choose(FOUND, None).compute == "dense:2"
    certain = [replace(each, standard_error=0.0) for each in FOUND]
    assert choose(certain, None).compute == "dense:10"
    unsure = [replace(each, standard_error=1.0) for each in FOUND]
    assert choose(unsure, None).compute == "dense:1"


def test_a_tolerance_makes_close_ones_equal():
    certain = [replace(each, standard_error=0.0) for each in FOUND]
    assert choose(certain, None, tolerance=0.02).compute == "dense:2"
    assert choose(certain, None, tolerance=0.2).compute == "dense:1"


def test_of_equal_scores_the_cheapest_wins():
    equal = [replace(each, score=0.3, behind=0.0, standard_error=0.0) for each in FOUND]
    assert choose(equal, None).compute == "dense:1"


def test_a_budget_is_the_99th_percentile_and_dropped_candidates_are_never_chosen():
    certain = [replace(each, standard_error=0.0) for each in FOUND]
    assert choose(certain, 19.9).compute == "dense:2"
    assert choose(certain, 20).compute == "dense:10"
    dropped = [*certain[:2], replace(certain[2], reason="dropped after 8 episodes")]
    assert choose(dropped, None).compute == "dense:2"
    with pytest.raises(CalibrationError, match=r"Nothing fits 1 ms here; the fastest, dense:1, takes 2.0 ms at p99"):
        choose(certain, 1)
    barred = [replace(certain[0], reason="averages draws"), *certain[1:]]
    with pytest.raises(CalibrationError, match=r"the fastest, dense:2, takes 4.0 ms at p99"):
        choose(barred, 1)


def test_auto_is_the_choice_and_the_default(checkpoint, tmp_path):
    assert parse("auto", checkpoint=checkpoint) == parse("dense:2") == calibrated(tmp_path, lambda _: "aa")
    assert default_name(tmp_path) == "auto"
    assert default_name(tmp_path / "other") == "dense"
    assert calibrated(tmp_path / "other", lambda _: pytest.fail("nothing to compare with")) is None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: replace(MADE, checkpoint="bb").save(file), "was made for checkpoint bb, and this one is aa"),
        (lambda file: replace(MADE, choice="dense:3").save(file), "chooses dense:3, which is no candidate in it"),
        (lambda file: file.write_text("{"), "is damaged"),
        (lambda file: file.unlink(), "was not calibrated yet"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_the_command_that_cures_it(checkpoint, spoil, sentence):
    spoil(checkpoint.folder / FOLDER / FILE)
    with pytest.raises(CalibrationError, match=sentence) as refusal:
        parse("auto", checkpoint=checkpoint)
    assert f"vlaflow calibrate {checkpoint.folder} --dataset DIR --sampler" in str(refusal.value)


def test_settings_of_the_moment_do_not_change_what_was_calibrated(checkpoint):
    """The steps of a name that states none are those it was measured with."""
    unstated = replace(MADE, candidates=(candidate("dense", 2, 0.3), candidate("mean:4", 3, 0.2)), choice="mean:4")
    unstated.save(checkpoint.folder / FOLDER / FILE)
    turned = Knobs(steps=3, threshold=0.9)
    assert parse("auto", turned, checkpoint) == parse("mean:4")
    assert within(checkpoint, 5, turned).compute == parse("dense")


def test_auto_stands_alone(checkpoint):
    with pytest.raises(ConfigError, match="auto stands alone"):
        parse("auto:2", checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("first", "count", "free"), [(1000, 50, True), (500_040, 5, True), (499_990, 10, True), (500_039, 1, False)]
)
def test_a_choice_is_never_reported_on_its_own_episodes(first, count, free):
    MADE.episodes.require_unseen(["metaworld/peg-insert-side-v3"], 500_000, 40)
    if free:
        MADE.episodes.require_unseen(MADE.envs, first, count)
    else:
        with pytest.raises(ConfigError, match=r"Evaluate other seeds: --seed 500040"):
            MADE.episodes.require_unseen(MADE.envs, first, count)


def test_a_budget_chooses_among_the_calibrated_samplers(checkpoint, monkeypatch):
    assert within(checkpoint, 100).compute == Dense(2, label="dense:2")
    assert "failures 0.31" in str(within(checkpoint, 100))
    assert within(checkpoint, 3).compute.name == "dense:1"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one core suffices for one thread
    assert within(checkpoint, 3).compute.name == "dense:1"
    monkeypatch.setattr(sampler_choice, "processor", lambda: "another machine")
    with pytest.raises(CalibrationError, match="A budget needs"):  # its milliseconds do not hold there
        within(checkpoint, 100)


def test_an_early_exit_competes_at_its_worst_case():
    scores = {"dense:1": 2.0, "dense:2": 1.0, "dense:10": 0.75}
    found = tuple(replace(e, score=scores[e.compute], behind=log(scores[e.compute] / 0.75), standard_error=0.0) for e in FOUND)
    by_frames = replace(MADE, criterion="plausible_error", candidates=found)
    plan = ExitPlan((1, 2, 3), sampling=Sampling(2))
    share = ShareTarget("exponential", 0.4, True, (0.7, 0.3))
    better = ExitEffect(100, (0.7, 0.3), 2.3, 10.0, 4.6, 0.1, error=0.5, full_error=1.0)
    exits = {"fast": Calibration("aa", "dd", plan, (None,), share, 100, better, "", {})}
    profile = Profile(
        "aa",
        processor(),
        1,
        base=1.0,
        prefix=(1, 2, 3),
        step=(1, 2, 3),
        jitter=1.5,
        chunks=9,
        versions={},
        work=ChunkWork(Work(), (Work(1),) * 3, (Work(1),) * 3),
        cost=CostModel(1, 1, 1),
    )
    worst = 1.5 * (1 + 3 + 2 * (1 + 2 + 3))
    assert choose_sampler(worst + 0.1, by_frames, profile, exits, str).compute == "exit:fast"
    assert choose_sampler(worst - 0.1, by_frames, profile, exits, str).compute == "dense:10"
    assert choose_sampler(worst + 0.1, by_frames, None, exits, str).compute == "dense:10"
