"""``vlaflow calibrate --sampler`` from a trained checkpoint to ``auto``; measures in closed form."""

import json
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.evaluation.conftest import ENV
from vlaflow.cli.calibrate import CalibrateArguments
from vlaflow.cli.calibrate_options import OPTIONS
from vlaflow.cli.main import main
from vlaflow.compute.base import ComputePolicy, Decoded
from vlaflow.compute.parse import parse
from vlaflow.compute.sampler_choice import FAILURES, load
from vlaflow.compute.spelling import Checkpoint
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.errors import CalibrationError, ConfigError
from vlaflow.evaluation import calibrate_sampler, sampler_episodes
from vlaflow.evaluation.calibrate import sample
from vlaflow.evaluation.calibrate_sampler import SamplerRequest, after_training, candidates, run
from vlaflow.evaluation.rollout import RolloutConfig
from vlaflow.evaluation.sampler_measures import (
    CRITERION,
    Demonstrated,
    SampledChunks,
    SamplerMeasures,
    Scale,
    measure,
    plausible_error,
    two_group_share,
)
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.simulators.record import RecordConfig, record
from vlaflow.training.run import Options, train

WAYS = ("dense:2", "dense:2@0", "mean:2+dense:1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampler") / "dataset"
    record(RecordConfig((ENV,), 4, size=64), out, workers=0)
    return out


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A few steps of AsyncVLA's demo."""
    out = tmp_path_factory.mktemp("sampler") / "policy"
    small = {"steps": "3", "global_batch_size": "8", "validation_fraction": "0.5", "validate_every": "3"}
    shape = {"width": "32", "heads": "2", "ffn": "64", "depth": "2", "image_size": "64"}
    changes = small | {f"policy.backbone.{k}": v for k, v in shape.items()} | {"policy.exits": "null"}
    train("asyncvla.demo", dataset, out, options=Options(changes, tracker="none", command="test", threads=1))
    return out


@pytest.fixture
def checkpoint(trained, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(trained, folder)
    return folder


# -- measures ------------------------------------------------------------------------------------------------------------

SCALE = Scale(
    4,
    torch.tensor([False, False, True]),
    torch.zeros(3),
    Demonstrated(torch.zeros(1, 12, dtype=torch.float64), torch.tensor([99])),
)


def sampled(chunk_BKLD, target_BLD, after_BLD=None, valid_BL=None):
    valid_BL = torch.ones(target_BLD.shape[:2], dtype=torch.bool) if valid_BL is None else valid_BL
    return SampledChunks(
        chunk_BKLD, after_BLD, target_BLD, valid_BL, np.ones(len(target_BLD), bool), torch.arange(len(target_BLD))
    )


def draws(batch=3, k=2, length=6, dim=3):
    return torch.randn(batch, k, length, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_demonstration_itself_has_no_error_spread_or_inconsistency():
    target_BLD = draws()[:, 0]
    after_BLD = torch.cat((target_BLD[:, 4:], target_BLD[:, :4]), 1)
    found = SCALE.values(sampled(target_BLD[:, None].expand(-1, 2, -1, -1), target_BLD, after_BLD))
    assert set(found) >= {"executed_error", "gripper_error", "spread", "inconsistency", "nearest_error"}
    for name, value_B in found.items():
        assert name in ("roughness", "implausibility") or not bool(value_B.any()), name


def test_an_offset_is_all_error_and_no_shape():
    target_BLD = draws()[:, 0]
    found = SCALE.values(sampled((target_BLD + 0.5)[:, None], target_BLD))
    for name in ("executed_error", "chunk_error", "first_error"):
        torch.testing.assert_close(found[name], torch.full((3,), 0.25, dtype=torch.float64))
    assert float(found["shape_error"].max()) < 1e-12


def test_draws_on_both_sides_have_their_distance_as_spread_and_the_nearer_one_counts():
    target_BLD = torch.zeros(1, 6, 3, dtype=torch.float64)
    chunk_BKLD = torch.stack((target_BLD + 1, target_BLD - 3), 1)
    found = SCALE.values(sampled(chunk_BKLD, target_BLD, target_BLD + 2))
    assert float(found["spread"]) == pytest.approx(2)
    assert float(found["nearest_error"]) == pytest.approx(1)
    assert float(found["executed_error"]) == pytest.approx(5)
    assert float(found["inconsistency"]) == pytest.approx(1)  # the rest of the first draw is 1, the later chunk 2


def test_the_gripper_counts_by_its_side_and_only_executed_valid_actions_count():
    target_BLD = torch.ones(1, 6, 3, dtype=torch.float64)
    chunk_BKLD = target_BLD[:, None].clone()
    chunk_BKLD[0, 0, [0, 3, 5], 2] = -1  # one of them is not executed, and one is not valid
    valid_BL = torch.tensor([[True, True, True, False, True, True]])
    found = SCALE.values(sampled(chunk_BKLD, target_BLD, valid_BL=valid_BL))
    assert float(found["gripper_error"]) == pytest.approx(1 / 3)
    assert float(found["executed_error"]) == pytest.approx(4 / 9)
    assert float(found["chunk_error"]) == pytest.approx(8 / 15)


def test_a_straight_line_is_not_rough():
    line_L = torch.arange(6, dtype=torch.float64)
    chunk_BKLD = line_L[None, None, :, None].expand(1, 1, 6, 3).clone()
    assert float(SCALE.values(sampled(chunk_BKLD, chunk_BKLD[:, 0]))["roughness"]) == 0
    chunk_BKLD[..., 2, :2] += 1  # second differences 1, −2 at executed places 1, 2
    assert float(SCALE.values(sampled(chunk_BKLD, chunk_BKLD[:, 0]))["roughness"]) == pytest.approx(2.5)


def test_what_was_demonstrated_in_another_episode_is_plausible():
    one, other = torch.zeros(12), torch.ones(12)
    found = Demonstrated(torch.stack((one, other)), torch.tensor([3, 4]))
    chunk_BKHD = torch.stack((one, other, (one + other) / 2)).view(1, 3, 4, 3)
    torch.testing.assert_close(found.distance(chunk_BKHD, torch.tensor([5])), torch.tensor([[0.0, 0.0, 0.25]]))
    torch.testing.assert_close(found.distance(chunk_BKHD, torch.tensor([3])), torch.tensor([[1.0, 0.0, 0.25]]))
    alone = Demonstrated(one[None], torch.tensor([3]))
    assert bool(alone.distance(chunk_BKHD, torch.tensor([3])).isnan().all())


def test_the_criterion_is_the_geometric_mean_and_the_error_alone_where_there_is_nothing_to_compare_with():
    episode_N = np.array([0, 0, 1])
    error_N = np.array([1.0, 3.0, 5.0])
    far = SamplerMeasures({"executed_error": error_N, "implausibility": np.array([8.0, 8.0, np.nan])}, 1, 1)
    np.testing.assert_allclose(np.exp(plausible_error(far, episode_N)), [4.0, 5.0])


def test_means_by_episode_leave_out_frames_without_a_measure():
    found = SamplerMeasures({"x": np.array([1.0, np.nan, 3.0, np.nan])}, 1, 1)
    np.testing.assert_array_equal(found.by_episode("x", np.array([7, 7, 4, 9])), [3.0, 1.0, np.nan])


def test_the_same_frames_give_the_same_measures_and_costs_are_counted(trained, dataset):
    policy, data = Policy.from_pretrained(trained), Dataset.open(dataset)
    frames = sample(policy, data, range(4), 12)
    computes = [parse(name) for name in WAYS]
    one, chunk_NKLD = measure(policy, computes, frames, n_action_steps=8)
    other, _ = measure(policy, computes, frames, n_action_steps=8)
    assert chunk_NKLD.shape == (12, 2, 16, 4)
    for a, b in zip(one, other, strict=True):
        assert all(np.array_equal(a.values[name], b.values[name], equal_nan=True) for name in a.values)
    assert [each.nfe for each in one] == [2, 2, 2]
    assert not one[1].values["spread"].any()  # nothing is random at noise scale 0
    assert one[0].values["spread"].all()
    few, _ = measure(policy, computes, frames, n_action_steps=8, draws=1)
    assert "inconsistency" in one[0].values
    assert "inconsistency" not in few[0].values


class TwoWays(ComputePolicy):
    """Half of the draws are all +a, the others all −a, and every other observation has only one of the ways."""

    def __init__(self, apart):
        self.apart = apart

    name = "two ways"

    def decode(self, model, prefix, generators, watch, conditioning=None):
        side = torch.tensor([1.0 if i % 2 or torch.rand((), generator=g) < 0.5 else -1.0 for i, g in enumerate(generators)])
        batch, zeros = len(generators), (0,) * len(generators)
        chunk_BLD = self.apart * side[:, None, None] + torch.zeros(batch, 16, 4)
        return Decoded(chunk_BLD, (), zeros, zeros, zeros)


def test_two_groups_are_noticed_where_they_are_far_apart(trained, dataset):
    policy, data = Policy.from_pretrained(trained), Dataset.open(dataset)
    frames = sample(policy, data, range(4), 64)
    far, near = (two_group_share(policy, TwoWays(apart), frames, draws=16) for apart in (1.0, 0.1))
    assert 0.4 < far <= 0.5  # a lone draw on one side is a group, too
    assert near == 0


# -- calibration -----------------------------------------------------------------------------------------------------------


def test_candidates_are_what_the_model_can_run():
    flow = candidates(helpers.policy().model)
    assert {"dense:10", "dense:2@0", "mean:4+dense:2", "medoid:8+dense:2"} <= set(flow)
    assert not any("temperature" in name or "two-stage" in name for name in flow)
    for name in flow:
        parse(name).needs.check(helpers.policy().model, name)


def test_candidates_of_a_discrete_flow_are_splits_and_where_ids_are_ordered_expected_tokens():
    ordered, merged = (candidates(helpers.token_policy(DiscreteFlowConfig, t).model) for t in (helpers.BINS, helpers.FAST))
    assert {f"two-stage:{split}" for split in ("0+1", "0+4", "2+2", "4+2", "14+2")} <= set(merged) <= set(ordered)
    assert {"dense:2,expected", "two-stage:0+1,expected", "two-stage:2+2,expected"} <= set(ordered) - set(merged)


def test_frames_choose_and_auto_is_the_default_of_eval_and_act(checkpoint, dataset, tmp_path, capsys):
    words = [word for name in WAYS for word in ("--compute", name)]
    assert main(["calibrate", str(checkpoint), "--dataset", str(dataset), "--sampler", "--frames", "16", *words]) == 0
    made = load(Checkpoint(checkpoint, fingerprint(checkpoint)))
    assert made is not None
    assert [each.compute for each in made.candidates] == list(WAYS)
    assert made.criterion == CRITERION
    assert made.frames == 16
    assert all(0 < each.p50 <= each.p99 for each in made.candidates)
    assert f"Chosen: {made.choice}" in capsys.readouterr().out
    page = (checkpoint / "calibration" / "sampler.html").read_text()
    assert all(name in page for name in WAYS)

    out = tmp_path / "eval"
    short = ["--episodes", "1", "--max-steps", "16", "--no-videos", "--workers", "0"]
    assert main(["eval", str(checkpoint), "--env", ENV, *short, "--out", str(out)]) == 0
    assert {e["compute"] for e in json.loads((out / "results.json").read_text())["evaluations"]} == {made.choice}
    policy = Policy.from_pretrained(checkpoint)
    assert policy.default_compute == parse(made.choice)
    seen = sample(policy, Dataset.open(dataset), range(4), 4).windows.batch(np.array([0])).observation.split()[0]
    assert np.array_equal(policy.act(seen).actions, policy.act(seen, parse(made.choice)).actions)
    assert np.array_equal(policy.act(seen, "auto").actions, policy.act(seen).actions)


def test_a_candidate_named_twice_is_one_candidate(checkpoint, dataset):
    """By whatever spelling: times and measures are by policy."""
    twice = ("dense:1", "mean:2+dense", "dense:1", "mean:2")
    made = run(checkpoint, dataset, SamplerRequest(twice, frames=8, latency_chunks=2, draws=1))
    assert [each.compute for each in made.candidates] == ["dense:1", "mean:2+dense"]


def test_a_calibration_of_other_weights_is_refused(checkpoint, dataset):
    run(checkpoint, dataset, SamplerRequest(WAYS[:2], frames=8, latency_chunks=2, draws=1))
    policy = Policy.from_pretrained(checkpoint)
    first = next(policy.model.parameters())
    first.data += 1
    policy.save_pretrained(checkpoint)
    with pytest.raises(CalibrationError, match="was made for checkpoint"):
        _ = Policy.from_pretrained(checkpoint).default_compute


def test_episodes_choose_on_their_own_seeds_and_an_interrupted_calibration_continues(
    checkpoint, dataset, tmp_path, monkeypatch, capsys
):
    short = RolloutConfig(max_steps=8, batch=1)
    request = SamplerRequest(WAYS, frames=8, latency_chunks=2, draws=1, envs=(ENV,), episodes=12, rollout=short, workers=0)
    played, real = [], sampler_episodes.play_all

    def stumble(folder, jobs, *arguments, finished, **settings):
        def note(place, episode):
            finished(place, episode)
            played.append(jobs[place])
            if len(played) == 5:
                raise KeyboardInterrupt

        return real(folder, jobs, *arguments, finished=note, **settings)

    monkeypatch.setattr(sampler_episodes, "play_all", stumble)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, dataset, request)
    assert load(Checkpoint(checkpoint, fingerprint(checkpoint))) is None
    made = run(checkpoint, dataset, request)
    assert len(played) == sum(each.episodes for each in made.candidates) <= 12
    assert len({(job.compute, job.seed) for job in played}) == len(played)
    assert made.criterion == FAILURES
    assert min(job.seed for job in played) == made.first_seed == 500_000
    assert max(job.seed for job in played) == made.first_seed + made.seeds - 1
    assert not (checkpoint / "calibration" / "sampler-episodes").exists()
    again = run(checkpoint, dataset, request)
    assert [replace(e, p50=0, p99=0) for e in again.candidates] == [replace(e, p50=0, p99=0) for e in made.candidates]
    words = ["--seed", "500001", "--episodes", "1", "--workers", "0", "--out", str(tmp_path / "eval")]
    for name in ("auto", "budget:60000", "mean:2+auto", made.choice):
        assert main(["eval", str(checkpoint), "--env", ENV, "--compute", name, *words]) == 2
        assert f"Evaluate other seeds: --seed {500_000 + made.seeds}" in capsys.readouterr().err


def test_an_interrupted_calibration_goes_on_with_its_milliseconds_and_another_one_begins_with_fresh(
    checkpoint, dataset, monkeypatch, capsys
):
    """Measured again, milliseconds may fit the budget no longer, and then the rounds would be others."""
    words = ["calibrate", str(checkpoint), "--dataset", str(dataset), "--sampler", "--env", ENV, "--frames", "8"]
    words += [word for way in WAYS for word in ("--compute", way)] + ["--workers", "0"]
    real = sampler_episodes.play_all

    def interrupted(*given, **settings):
        raise KeyboardInterrupt

    def short(folder, jobs, rollout, **settings):
        return real(folder, jobs, replace(rollout, max_steps=8), **settings)

    monkeypatch.setattr(sampler_episodes, "play_all", interrupted)
    assert main([*words, "--rollouts", "12"]) == 130
    monkeypatch.setattr(sampler_episodes, "play_all", short)
    assert main([*words, "--rollouts", "24"]) == 2
    said = capsys.readouterr().err
    assert "with rollouts = 12, not 24. Discard it with --fresh." in said
    monkeypatch.setattr(calibrate_sampler, "measure_latency", lambda *_: pytest.fail("the candidates were measured before"))
    assert main([*words, "--rollouts", "12"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(sampler_episodes, "play_all", interrupted)
    assert main([*words, "--rollouts", "12"]) == 130
    monkeypatch.setattr(sampler_episodes, "play_all", short)
    assert main([*words, "--rollouts", "24", "--fresh"]) == 0
    assert not (checkpoint / "calibration" / "sampler-episodes").exists()


def test_too_few_episodes_for_the_candidates_are_refused_before_any_frame_is_measured(checkpoint, dataset, monkeypatch):
    monkeypatch.setattr(calibrate_sampler, "measure", None)
    request = SamplerRequest(WAYS, envs=(ENV,), episodes=len(WAYS) - 1)
    with pytest.raises(ConfigError, match=f"{len(WAYS)} candidates need at least"):
        run(checkpoint, dataset, request)


def test_a_training_ends_with_it_where_episodes_were_held_out(checkpoint, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_sampler, "QUICK_MS", 1e9)  # a busy machine measures fewer frames in a minute
    assert after_training(checkpoint, [dataset])[0].startswith("Calibrated the sampler on 96 held-out frames: ")
    assert Policy.from_pretrained(checkpoint).default_compute.name == load_choice(checkpoint)
    shutil.rmtree(checkpoint / "training")
    (checkpoint / "calibration" / "sampler.json").unlink()
    assert "it is unknown which episodes it was trained on" in after_training(checkpoint, [dataset])[0]
    assert not (checkpoint / "calibration" / "sampler.json").exists()


def load_choice(checkpoint):
    return json.loads((checkpoint / "calibration" / "sampler.json").read_text())["choice"]


def test_options_of_the_sampler_need_it(checkpoint, dataset, capsys):
    assert main(["calibrate", str(checkpoint), "--dataset", str(dataset), "--budget-ms", "20"]) == 2
    assert "--budget-ms has no effect on early exits; add --sampler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sampler", "--name", "strict"], "--name has no effect with --sampler; leave it out."),
        (["--sampler", "--max-deviation", "0.01"], "--max-deviation has no effect with --sampler"),
        (["--sampler", "--exit-distribution", "gamma"], "--exit-distribution has no effect with --sampler"),
        (["--sampler", "--rollouts", "90"], "--rollouts has an effect only with --env."),
        (["--sampler", "--fresh"], "--fresh has an effect only with --env."),
        (["--refine", "--exit-budget", "0.2"], "--exit-budget has no effect with --refine"),
        (["--refine", "--env", "metaworld/reach-v3"], "--env has no effect with --refine; leave it out."),
        (["--refine", "--share", "0.1", "--max-deviation", "1"], "Give either --share or --max-deviation"),
        (["--clock", "0.5"], "--clock has no effect on early exits; add --refine, or leave it out."),
        (["--compute", "dense"], "--compute has no effect on early exits; add --sampler or --refine"),
        (["--confidence", "0.99"], "--confidence has an effect only with --max-deviation."),
        (["--max-deviation", "1", "--no-first-exit"], "Give either --no-first-exit or --max-deviation"),
        (["--restart", "0.2"], "--restart has an effect only with --warm-start renoise."),
    ],
)
def test_an_option_without_an_effect_is_refused(words, said, capsys):
    assert main(["calibrate", "CKPT", "--dataset", "D", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_option_of_one_kind_alone_is_known_as_such():
    """A new option of the command must be listed, or be for all three kinds."""
    for_all = {"checkpoint", "dataset", "robot", "sampler", "refine", "episodes", "frames", "device", "dtype", "how", "hub"}
    assert {each.name for each in fields(CalibrateArguments)} - for_all == OPTIONS.keys()
