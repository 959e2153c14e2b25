"""Evaluation is a function of checkpoint, environment, compute policy and seed, and of nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.conftest import ENV
from vlaflow.compute.parse import parse, parse_all
from vlaflow.compute.spelling import Knobs
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.evaluation.latency import collect_observations, evenly, measure
from vlaflow.evaluation.rollout import (
    EpisodeBlock,
    EpisodeJob,
    RolloutConfig,
    blocks,
    one_thread,
    open_env,
    plan,
    play,
    play_all,
    play_block,
    require_fit,
)
from vlaflow.policies.base import Policy
from vlaflow.policies.seeds import chunk_generator, chunk_seed
from vlaflow.simulators.base import simulator_spec

SHORT = RolloutConfig(max_steps=10)
OTHER = "metaworld/window-close-v3"


def moments_of(checkpoint, compute):
    """Every chunk of one short episode."""
    policy, chunks = Policy.from_pretrained(checkpoint), []
    job = EpisodeJob(ENV, parse(compute, Knobs(steps=2)), 1000)
    with one_thread():
        episode = play(policy, open_env(policy, ENV, "fast"), job, SHORT, before=lambda step, seen, chunk: chunks.append(chunk))
    return episode, chunks


def test_a_batch_of_one_is_the_episode_played_alone_to_the_bit(checkpoint):
    jobs = plan([ENV], parse_all(["dense"], Knobs(2)), episodes=3)
    policy = Policy.from_pretrained(checkpoint)
    with one_thread():
        alone = [play(policy, open_env(policy, ENV, "fast"), job, SHORT) for job in jobs]
    assert play_all(checkpoint, jobs, replace(SHORT, batch=1), workers=0) == alone


@pytest.mark.parametrize("compute", ["dense", "refine"])
def test_a_block_plays_every_episode_with_its_own_scene_and_noise(checkpoint, compute):
    """Episodes of other lengths, so the batch shrinks; the chunks are those of single episodes up to rounding."""
    policy, config = Policy.from_pretrained(checkpoint), RolloutConfig(n_action_steps=2, batch=3)
    jobs = [EpisodeJob(ENV, parse(compute, Knobs(2)), 1000 + i, max_steps=limit) for i, limit in enumerate((6, 2, 4))]

    def into(chunks):
        return lambda step, seen, chunk: chunks.append(chunk.actions)

    alone, together = [[], [], []], [[], [], []]
    with one_thread():
        for job, chunks in zip(jobs, alone, strict=True):
            play(policy, open_env(policy, ENV, "fast"), job, config, after=into(chunks))
        found = play_block(
            policy, EpisodeBlock(tuple(jobs)), config, after={i: into(chunks) for i, chunks in enumerate(together)}
        )
    assert [(e.seed, e.steps, e.chunks) for e in found] == [(1000, 6, 3), (1001, 2, 1), (1002, 4, 2)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-3)
    assert not np.allclose(together[0][0], together[2][0], atol=1e-2)


def test_whole_blocks_that_are_left_are_formed_again():
    jobs = [
        *plan([ENV, OTHER], parse_all(["dense", "refine"]), 7),
        *(EpisodeJob(ENV, parse("dense"), i, "Fly") for i in range(2)),
    ]
    found = blocks(jobs, 3)
    assert sorted(place for block in found for place in block) == list(range(len(jobs)))
    assert sorted(map(len, found)) == [1] * 4 + [2] + [3] * 8
    for block in found:
        assert len({(jobs[p].env, jobs[p].compute.name, jobs[p].instruction) for p in block}) == 1
    left = sorted(place for block in found[2:] for place in block)
    again = blocks([jobs[place] for place in left], 3)
    assert [[left[p] for p in block] for block in again] == found[2:]


def test_a_batch_leaves_room_for_the_environment_of_a_video():
    """Otherwise that would close one of the block's own."""
    kept = simulator_spec("metaworld").kept
    assert max(map(len, blocks(plan([ENV], [parse("dense")], 40), 100))) == kept - 1
    with pytest.raises(ConfigError, match="batch counts episodes"):
        RolloutConfig(batch=0)


def test_the_first_draft_of_refinement_is_the_dense_chunk(checkpoint):
    """The same seed gives all compute policies the same first-round noise, bit for bit."""
    _, dense = moments_of(checkpoint, "dense")
    for name in ("refine", "refine-random"):
        _, refined = moments_of(checkpoint, name)
        assert refined[0].regenerated.any(), "a test of refinement needs a doubted action"
        np.testing.assert_array_equal(refined[0].draft, dense[0].actions)
        kept = ~refined[0].regenerated
        np.testing.assert_array_equal(refined[0].actions[kept], dense[0].actions[kept])


def test_the_max_steps_ends_an_episode_and_every_step_is_counted(checkpoint):
    episode, chunks = moments_of(checkpoint, "dense")
    assert (episode.steps, episode.chunks, episode.success, episode.first_success_step) == (10, 3, False, None)
    assert episode.nfe == sum(c.nfe for c in chunks) == 6
    assert episode.instruction == "Open a drawer"


def test_neighbouring_seeds_and_chunks_have_different_noise():
    states = {chunk_generator(seed, chunk).initial_seed() for seed in range(1000, 1020) for chunk in range(63)}
    assert len(states) == 20 * 63


def test_noise_seeds_are_other_noise_and_the_first_is_none():
    """All differ; the first keeps the numbers that this seed had before there were any others."""
    states = {chunk_seed(seed, chunk, noise) for seed in range(1000, 1010) for chunk in range(20) for noise in range(5)}
    assert len(states) == 10 * 20 * 5
    assert chunk_seed(1000, 3) == chunk_seed(1000, 3, 0) == 8771877438590485100


def test_every_compute_policy_plays_every_seed_with_every_noise_seed():
    dense, refine = parse_all(["dense", "refine"])
    jobs = plan([ENV], [dense, refine], 2, 7, noise_seeds=3)
    played = [(job.seed, job.noise_seed) for job in jobs if job.compute == dense]
    assert played == [(7, 0), (7, 1), (7, 2), (8, 0), (8, 1), (8, 2)]
    assert played == [(job.seed, job.noise_seed) for job in jobs if job.compute == refine]
    assert plan([ENV], [dense], 2, 7) == [job for job in plan([ENV], [dense], 2, 7, noise_seeds=3) if not job.noise_seed]


def test_a_noise_seed_changes_the_noise_and_nothing_else(checkpoint):
    """The same scene, so the same first observation, and another chunk; the result says which."""
    first, seen = [], []
    policy = Policy.from_pretrained(checkpoint)
    for noise_seed in (0, 1):
        job = EpisodeJob(ENV, parse("dense", Knobs(steps=2)), 1000, noise_seed=noise_seed)
        chunks, observations = [], []
        with one_thread():
            episode = play(
                policy,
                open_env(policy, ENV, "fast"),
                job,
                RolloutConfig(max_steps=4),
                before=lambda step, o, chunk, c=chunks, s=observations: (c.append(chunk), s.append(o)),
            )
        assert episode.noise_seed == noise_seed
        first.append(chunks[0].actions)
        seen.append(observations[0])
    np.testing.assert_array_equal(seen[0].state, seen[1].state)
    assert not np.array_equal(first[0], first[1])


def test_a_missing_rater_is_refused_before_any_episode(bare_checkpoint):
    jobs = plan([ENV], parse_all(["dense", "refine"]), 1)
    with pytest.raises(CapabilityError, match=r"vlaflow train asyncvla\.rater"):
        play_all(bare_checkpoint, jobs, SHORT, workers=2)


def test_an_unknown_compute_policy_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'refine-random'"):
        parse("refine_random")


def test_other_actions_are_refused(checkpoint):
    policy = Policy.from_pretrained(checkpoint)
    other = replace(policy, action_spec=replace(policy.action_spec, rate_hz=10.0))
    with pytest.raises(SpecError, match=r"rate_hz is 10\.0"):
        require_fit(other, "x", {ENV}, [], SHORT)


@pytest.mark.parametrize("wrong", [RolloutConfig(n_action_steps=9), RolloutConfig(max_steps=501)])
def test_impossible_settings_are_refused(checkpoint, wrong):
    with pytest.raises(ConfigError):
        require_fit(Policy.from_pretrained(checkpoint), "x", {ENV}, [], wrong)


def test_latency_is_measured_on_a_few_environments_from_the_whole_list():
    names = [f"suite/{i}" for i in range(50)]
    assert evenly(names, 8) == [f"suite/{i}" for i in (0, 6, 12, 18, 25, 31, 37, 43)]
    assert evenly(names[:8], 8) == names[:8]
    assert len(evenly(names[:9], 8)) == 8


def test_latency_parts_add_up_to_the_total(checkpoint):
    policy = Policy.from_pretrained(checkpoint)
    with one_thread():
        seen = collect_observations(policy, plan([ENV], [parse("dense")], 2), SHORT)
    assert len(seen) > 2
    dense, refine = measure(policy, parse_all(["dense", "refine"], Knobs(2)), seen, chunks=4, warm_up=1)
    assert (dense.chunks, dense.nfe, dense.layer_passes) == (4, 2.0, 3.0)
    assert {"prefix", "first"} <= set(dense.parts)
    assert "rater" not in dense.parts
    assert "rater" in refine.parts
    for latency in (dense, refine):
        assert sum(latency.mean_parts.values()) == pytest.approx(latency.mean)
        assert latency.total.p50 <= latency.total.p99
