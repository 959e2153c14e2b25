"""Calibrations serve what they were made for, and a budget picks the best that fits."""

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from vlaflow.compute.budget import LADDER, PROFILE, Ladder, Profile, Rung, choose, profile_file, save, within
from vlaflow.compute.calibration import FOLDER, Calibration, ExitEffect, ShareTarget, load_exit, with_folder
from vlaflow.compute.cost import ChunkWork, CostModel, Work
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import Refine
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.versions import processor

PLAN = ExitPlan((1, 2, 3))
MADE = Calibration(
    checkpoint="aa",
    dataset="dd",
    plan=PLAN,
    thresholds=(None,),
    target=ShareTarget("exponential", 0.4, True, (0.7, 0.3)),
    samples=100,
    effect=ExitEffect(100, (0.7, 0.3), 2.3, 10.0, 4.6, 0.1, 0.5, 0.5),
    command="vlaflow calibrate",
    versions={"vlaflow": "0"},
)
BETTER = replace(MADE, effect=replace(MADE.effect, error=0.4))
"""Lucky: nearer to the demonstrations than its own full depth."""
WORK = ChunkWork(Work(0, 0.5), (Work(1, 0.5), Work(2, 1), Work(3, 1.5)), (Work(2, 0.25), Work(3, 0.5), Work(4, 0.75)))
TIMES = Profile(
    "aa",
    processor(),
    1,
    base=1.0,
    prefix=(1.0, 2.0, 3.0),
    step=(1.0, 2.0, 3.0),
    jitter=1.5,
    chunks=100,
    versions={},
    work=WORK,
    cost=CostModel(1.0, 0.5, 1.0),
)
LOSS = Ladder(
    "aa",
    "dd",
    100,
    (Rung(1, 1, 0.9, 0.9), Rung(1, 10, 0.8, 0.8), Rung(3, 1, 0.4, 0.6), Rung(3, 2, 0.2, 0.55), Rung(3, 10, 0.0, 0.5)),
)


def test_a_calibration_survives_its_file_and_never_means_never(tmp_path):
    file = tmp_path / "x.json"
    MADE.save(file)
    assert Calibration.load(file) == MADE
    assert MADE.early_exit("x").thresholds == (-inf, inf)
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"checkpoint": "bb"}, "made for checkpoint aa, and this one is bb"),
        ({"dataset": "ee"}, "data set dd, and this one is ee"),
        ({"dtype": "bf16"}, "was made in fp32, and this is bf16.*--dtype bf16"),
        ({"plan": replace(PLAN, metric="l2")}, "made with metric cosine, not l2"),
        ({"plan": replace(PLAN, depths=(1, 3))}, r"depths \(1, 2, 3\), not \(1, 3\)"),
        ({"plan": replace(PLAN, warm_start="anchor")}, "warm_start same"),
        ({"plan": replace(PLAN, sampling=Sampling(10))}, "sampling 2, not 10"),
    ],
)
def test_what_it_was_not_made_for_is_refused_in_one_sentence(asked, words):
    with pytest.raises(CalibrationError, match=words) as refusal:
        MADE.require("x.json", **asked)
    assert "\n" not in str(refusal.value)
    MADE.require("x.json", checkpoint="aa", dataset="dd", plan=PLAN)


def test_an_exit_is_found_by_name_and_refused_for_other_weights(tmp_path):
    MADE.save(tmp_path / FOLDER / "fast.json")
    home = Checkpoint(tmp_path, "aa")
    assert parse("exit:fast", checkpoint=home) == load_exit(home, "fast")
    both = parse("refine+exit:fast", Knobs(4), home)
    assert isinstance(both, Refine)
    assert both.name == "refine(exit:fast)"
    with pytest.raises(CalibrationError, match="did you mean 'fast'"):
        parse("exit:fats", checkpoint=home)
    with pytest.raises(CalibrationError, match="made for checkpoint aa"):
        parse("exit:fast", checkpoint=Checkpoint(tmp_path, "bb"))
    with pytest.raises(CalibrationError, match="made in fp32"):
        parse("exit:fast", Knobs(dtype="bf16"), home)
    (tmp_path / FOLDER / "fast.json").write_text("{")
    with pytest.raises(CalibrationError, match="not valid JSON"):
        parse("exit:fast", checkpoint=home)


def test_names_that_people_type():
    assert parse("dense:2,depth=3") == Dense(2, depth=3, label="dense:2,depth=3")
    assert parse("dense", Knobs(steps=7)) == Dense(7)
    for wrong in ("dense:x", "dens", "exit:fast", "budget:20", "exit"):
        with pytest.raises(ConfigError):
            parse(wrong)


def test_a_budget_takes_the_smallest_error_that_fits():
    found = {ms: choose(ms, TIMES, LOSS, {}).compute for ms in (5, 12, 60)}
    # p99: 1.5 × (1 + prefix + evaluations × step) = 4.5, 18, 10.5, 15 and 51 ms
    assert [(c.steps, c.depth) for c in found.values()] == [(1, 1), (1, 3), (10, 3)]


def test_an_early_exit_counts_with_all_its_depths():
    worst = 1.5 * (1 + 3 + 2 * (1 + 2 + 3))
    found = {"fast": BETTER}
    assert choose(worst + 0.1, TIMES, LOSS, found).compute.name == "exit:fast"
    assert choose(worst - 0.1, TIMES, LOSS, found).compute.name != "exit:fast"


def test_what_an_early_exit_loses_by_its_few_steps_counts():
    """Its own full depth is compared at as many steps; what these lose comes on top."""
    taken = choose(25, TIMES, LOSS, {"fast": BETTER})
    assert taken.error == pytest.approx(0.55 * 0.4 / 0.5)
    assert f"by {0.2 + 0.1:.3f} standard deviations" in taken.loss
    assert choose(25, TIMES, LOSS, {"fast": MADE}).compute.name == "dense:2,depth=3"  # as good, and sooner at worst
    lost = replace(LOSS, rungs=(*LOSS.rungs[:3], Rung(3, 2, 0.4, 0.9), LOSS.rungs[4]))
    assert choose(25, TIMES, lost, {"fast": BETTER}).compute.name == "dense:1,depth=3"


def test_a_ladder_without_the_steps_of_an_early_exit_is_measured_again():
    lacking = replace(LOSS, rungs=tuple(rung for rung in LOSS.rungs if rung.nfe != 2))
    with pytest.raises(CalibrationError, match="what 2 evaluations at full depth lose, which exit:fast makes"):
        choose(60, TIMES, lacking, {"fast": MADE})


@pytest.mark.parametrize(
    ("times", "loss", "words"),
    [
        (TIMES, replace(LOSS, rungs=tuple(rung for rung in LOSS.rungs if rung.nfe != 2)), "vlaflow calibrate {} --dataset DIR"),
        (TIMES, replace(LOSS, rungs=(Rung(4, 1, 0.0, 0.5),)), "vlaflow bench latency {}"),
        (replace(TIMES, jitter=1.0), replace(LOSS, checkpoint="bb"), "measure again: vlaflow calibrate {} --dataset DIR"),
        (replace(TIMES, checkpoint="bb"), LOSS, "measure again: vlaflow bench latency {}"),
    ],
)
def test_what_was_measured_otherwise_is_told_with_the_checkpoint_to_measure(times, loss, words, tmp_path):
    MADE.save(tmp_path / FOLDER / "fast.json")
    save(times, tmp_path / PROFILE)
    save(loss, tmp_path / FOLDER / LADDER)
    with pytest.raises(CalibrationError, match=words.format(tmp_path)):
        within(Checkpoint(tmp_path, "aa"), 60)


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(CalibrationError, match=r"Nothing fits 2 ms here; the fastest, dense:1,depth=1, takes 4.5 ms"):
        choose(2, TIMES, LOSS, {})


@pytest.mark.parametrize("typed", ["budget:nan", "budget:0", "budget:-5", "budget:", "budget:soon"])
def test_a_budget_that_is_no_time_is_told_what_to_type(typed, tmp_path):
    with pytest.raises(ConfigError, match="A budget is a number of milliseconds above 0, as in budget:20"):
        parse(typed, checkpoint=Checkpoint(tmp_path, "aa"))


def test_a_budget_reads_the_checkpoint_folder(tmp_path):
    home = Checkpoint(tmp_path, "aa")
    with pytest.raises(CalibrationError, match="vlaflow bench latency"):
        within(home, 60)
    save(TIMES, tmp_path / PROFILE)
    with pytest.raises(CalibrationError, match=rf"vlaflow calibrate {tmp_path} --dataset DIR --sampler$"):  # also without exits
        within(home, 60)
    save(LOSS, tmp_path / FOLDER / LADDER)
    assert parse("budget:60", checkpoint=home).steps == 10
    assert "+0.0 %" in str(within(home, 60))
    BETTER.save(tmp_path / FOLDER / "fast.json")
    assert parse("budget:25", checkpoint=home).name == "exit:fast"
    for other in ({"threads": 2}, {"device": "a GPU"}, {"dtype": "bf16"}):
        save(replace(TIMES, **other), tmp_path / PROFILE)
        with pytest.raises(CalibrationError, match=r"this is cpu with 1 in fp32\. .*--device cpu --threads 1 --dtype fp32"):
            within(home, 60)
        with pytest.raises(CalibrationError, match="was measured on"):
            parse("budget:60", Knobs(threads=3), home)
    save(replace(TIMES, threads=2), tmp_path / PROFILE)
    assert parse("budget:60", Knobs(threads=2), home).name == "exit:fast"
    save(replace(TIMES, dtype="bf16"), tmp_path / PROFILE)
    with pytest.raises(CalibrationError, match=r"ladder\.json .* was measured in fp32, and this is bf16"):
        parse("budget:60", Knobs(dtype="bf16"), home)
    save(replace(LOSS, dtype="bf16"), tmp_path / FOLDER / LADDER)
    assert parse("budget:60", Knobs(dtype="bf16"), home).name != "exit:fast", "that was calibrated in fp32"
    save(LOSS, tmp_path / FOLDER / LADDER)
    save(replace(TIMES, machine="another"), tmp_path / PROFILE)
    with pytest.raises(CalibrationError, match="measured on another"):
        within(home, 60)
    save(replace(TIMES, checkpoint="bb"), tmp_path / PROFILE)
    with pytest.raises(CalibrationError, match="other weights"):
        within(home, 60)


FASTER = replace(TIMES, prefix=(0.5, 1.0, 1.5), step=(0.5, 1.0, 1.5), engine="aoti f32")
"""The same chunks computed by programs: what took 51 ms at p99 takes 26.25."""


def test_a_budget_is_chosen_for_the_engine_that_computes(tmp_path):
    home, programs = Checkpoint(tmp_path, "aa"), Knobs(engine="aoti f32")
    save(LOSS, tmp_path / FOLDER / LADDER)
    save(TIMES, tmp_path / PROFILE)
    with pytest.raises(CalibrationError, match=r"needs latency-aoti\.json"):
        parse("budget:30", programs, home)
    save(FASTER, tmp_path / profile_file("aoti f32"))
    assert (parse("budget:30", checkpoint=home).steps, parse("budget:30", programs, home).steps) == (2, 10)
    with pytest.raises(CalibrationError, match="measured with engine aoti f32; this is aoti bf16"):
        parse("budget:30", Knobs(engine="aoti bf16"), home)


@pytest.mark.parametrize(
    ("knobs", "options"),
    [
        (Knobs(), ""),
        (Knobs(engine="aoti f32"), ""),
        (Knobs(threads=2), " --threads 2"),
        (Knobs(device="cuda", dtype="bf16"), " --device cuda --dtype bf16"),
        (Knobs(device="cuda:1", engine="graphs bf16"), " --device cuda:1 --engine graphs"),
    ],
)
def test_what_a_budget_lacks_is_told_with_the_options_that_measure_it(tmp_path, knobs, options):
    """``vlaflow bench latency`` times every program on a CPU, and by default nothing on a GPU."""
    with pytest.raises(CalibrationError, match=f"Measure it: vlaflow bench latency {tmp_path}{options}$"):
        within(Checkpoint(tmp_path, "aa"), 60, knobs)


def test_milliseconds_that_were_measured_eagerly_are_converted_by_both_costs():
    """10 ms for ten steps, which cost 1 + 21.5 + 9.5 eagerly, and half of it by programs."""
    half = replace(FASTER, cost=CostModel(0.5, 0.25, 0.5))
    assert half.converted(10.0, 10, 33, TIMES) == pytest.approx(5.0)
    assert TIMES.converted(10.0, 10, 33, TIMES) == pytest.approx(10.0)


def test_a_cure_names_the_folder_and_leaves_a_path_with_the_placeholders_name():
    """Who follows the documentation to the letter has a folder called CKPT."""
    said = with_folder("latency.json in /runs/CKPT/a was measured elsewhere: vlaflow bench latency CKPT", Path("/runs/CKPT/a"))
    assert said == "latency.json in /runs/CKPT/a was measured elsewhere: vlaflow bench latency /runs/CKPT/a"
