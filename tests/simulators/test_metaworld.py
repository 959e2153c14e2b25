"""Meta-World against LeRobot's own environment, and the promises of `Environment`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlaflow.errors import SpecError
from vlaflow.simulators import display, make, simulator_spec
from vlaflow.simulators.experts import expert_for

FIXTURE = Path(__file__).parents[1] / "fixtures" / "metaworld_lerobot"
GOLDEN = json.loads((FIXTURE / "states.json").read_text())


@pytest.fixture(scope="module")
def env():
    return make("metaworld/drawer-open-v3", size=48)


@pytest.mark.parametrize("task", sorted(GOLDEN["agent_pos_after_reset_and_each_step"]))
def test_exact_rendering_gives_lerobots_pixels_and_states_to_the_bit(task):
    """Published checkpoints saw these pixels; anything else would be another benchmark.

    The opening of the fingers may differ in its last bit: Meta-World takes it from numpy's norm, whose dot product is
    fused on processors with AVX-512 (where the fixture was made: a fused sum reproduces it exactly) and not on others.
    The physics and the float32 state that a policy sees are the same to the bit everywhere.
    """
    env = make(f"metaworld/{task}", render="exact")
    expected = GOLDEN["agent_pos_after_reset_and_each_step"][task]
    env.reset(seed=GOLDEN["seed"])
    states = [env.raw_observation[:4].tolist()]
    first = env.render()
    for action in GOLDEN["actions"]:
        env.advance(np.array(action, np.float32))
        states.append(env.raw_observation[:4].tolist())
    states, expected = np.array(states), np.array(expected)
    assert np.array_equal(states[:, :3], expected[:, :3])
    assert np.all(np.abs(states - expected) <= np.spacing(expected))
    assert np.array_equal(states.astype(np.float32), expected.astype(np.float32))
    for step, image in ((0, first), (6, env.render())):
        reference = np.asarray(Image.open(FIXTURE / f"{task}_seed{GOLDEN['seed']}_step{step}.png"))
        assert np.array_equal(image, reference)


@pytest.mark.parametrize("task", ["push-v3", "pick-place-v3"])
def test_building_without_mt1_gives_what_mt1_gives(task):
    """The benchmark object that LeRobot builds draws fifty random vectors; the first one is the only one that matters."""
    import metaworld

    benchmark = metaworld.MT1(task, seed=42)
    theirs = benchmark.train_classes[task]()
    theirs.set_task(benchmark.train_tasks[0])
    before = repr(np.random.get_state(legacy=False))
    ours = make(f"metaworld/{task}")
    assert before == repr(np.random.get_state(legacy=False))
    assert np.array_equal(theirs._last_rand_vec, ours._first_draw)
    theirs.reset()
    theirs._freeze_rand_vec, theirs.seeded_rand_vec = False, True
    theirs.seed(1001)
    raw, _ = theirs.reset()
    ours.restart(1000)
    ours.restart(1001)
    assert np.array_equal(raw, ours.raw_observation)
    assert np.array_equal(theirs.data.site("goal").xpos, ours._sim.data.site("goal").xpos)


def test_the_first_frame_does_not_depend_on_the_episode_before():
    """Meta-World alone would draw push-v3's goal dot at a height left over from the last episode."""
    env = make("metaworld/push-v3", size=96)
    first = env.reset(seed=1000)[0]["pixels"]
    expert = expert_for(env.name)
    env.restart(seed=1001)
    for _ in range(60):
        env.advance(expert(env))
    assert np.array_equal(env.reset(seed=1000)[0]["pixels"], first)


def test_the_same_seed_gives_the_same_bytes_whatever_happened_before(env):
    """Environments are reused across episodes, so nothing may carry over."""

    def episode(seed):
        observation, _ = env.reset(seed=seed)
        frames = [observation["pixels"]]
        actions = np.random.default_rng(0).uniform(-1, 1, (12, 4))
        return frames + [env.step(a)[0]["pixels"] for a in actions], env.raw_observation.copy()

    first, state = episode(1000)
    other, _ = episode(1001)
    again, state_again = episode(1000)
    assert np.array_equal(first, again)
    assert np.array_equal(state, state_again)
    assert not np.array_equal(first[0], other[0])


def test_fast_rendering_shows_the_same_scene(env):
    """Without shadows and multisampling the image differs a little and not more: mean below 12 of 255."""
    fast, exact = make("metaworld/drawer-open-v3", size=96), make("metaworld/drawer-open-v3", render="exact", size=96)
    pictures = [e.reset(seed=1003)[0]["pixels"].astype(int) for e in (fast, exact)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 12


def test_fast_images_show_simpler_meshes_and_physics_keeps_its_own(env):
    """Meshes that collide are shown here, so they are simplified as well, but only while they are uploaded."""
    env.reset(seed=7)
    model = env._sim.model
    kept = {name: getattr(model, name).copy() for name in display._CHANGED}
    with display.simplified(model, 48, solid=True):
        assert model.mesh_facenum.sum() < kept["mesh_facenum"].sum() / 3
    env.close()
    env.render()
    assert all(np.array_equal(getattr(model, name), value) for name, value in kept.items())


def test_environments_that_take_turns_do_not_see_each_others_images():
    """All models of a process share one OpenGL context, so each image must claim the buffer it is painted into."""
    names = ("metaworld/push-v3", "metaworld/window-close-v3")
    envs = [make(names[0], size=32), make(names[1], size=48), make(names[1], size=48), make(names[1], render="exact", size=48)]
    alone = [[env.reset(seed=seed)[0]["pixels"] for seed in (1000, 1001)] for env in envs]
    for which, seed in enumerate((1001, 1000)):
        for env, pictures in zip(envs, alone, strict=True):
            assert np.array_equal(env.reset(seed=seed)[0]["pixels"], pictures[1 - which])


def test_a_frame_is_rendered_at_most_once(env):
    """Looking twice at the same moment costs one image."""
    env.restart(seed=1000)
    before = env.renders
    env.observe(), env.render(), env.observe()
    assert env.renders == before + 1


def test_a_caller_who_paints_on_a_frame_does_not_change_the_next(env):
    """Frames are handed out as copies."""
    env.reset(seed=1000)
    env.render()[:] = 0
    assert env.render().any()


@pytest.mark.parametrize(("axis", "low", "high"), [(0, -0.05, 0.05), (1, 0.6, 0.65), (2, 0.2, 0.25)])
def test_positive_actions_move_the_hand_as_the_action_spec_says(env, axis, low, high):
    """+x, +y, +z raise the hand's world coordinate; the robot's base is at y = 0, so +y leads away from it."""
    env.restart(seed=1000)
    start = env.state.copy()
    for _ in range(10):
        action = np.zeros(4)
        action[axis] = 1.0
        env.advance(action)
    assert env.state[axis] - start[axis] > 0.02


def test_a_positive_gripper_action_closes(env):
    """State 3 is the opening of the fingers."""
    env.restart(seed=1000)
    for _ in range(20):
        env.advance(np.array([0, 0, 0, 1.0]))
    assert env.state[3] < 0.6


def test_the_action_rate_and_step_are_the_simulators(env):
    """rate_hz = 1 / (timestep x frame skip), 1 cm per unit."""
    assert env.action_spec.rate_hz == pytest.approx(1 / env._sim.dt)
    assert env._sim.action_scale == 0.01


def test_the_max_steps_truncates_at_500_and_no_further(env):
    """500 is LeRobot's step limit; stepping on is a mistake of the caller."""
    env.restart(seed=1000)
    for step in range(1, 501):
        _, terminated, truncated, info = env.advance(np.zeros(4))
        assert not terminated
        assert truncated == (step == 500)
    assert info["steps"] == 500
    assert info["first_success_step"] == -1
    with pytest.raises(SpecError, match="reset"):
        env.advance(np.zeros(4))


@pytest.mark.parametrize("action", [np.zeros(3), np.full(4, np.nan), np.zeros((1, 4))])
def test_an_action_of_another_shape_or_not_finite_is_refused(env, action):
    """A silent NaN would make the physics explode later."""
    env.restart(seed=1000)
    with pytest.raises(SpecError, match="4 finite numbers"):
        env.advance(action)


def test_every_task_of_the_table_exists_in_metaworld_and_no_other():
    """Names in the table are the names users type."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    spec = simulator_spec("metaworld")
    assert set(spec.tasks) == set(ALL_V3_ENVIRONMENTS)
    assert {g: len(t) for g, t in spec.groups.items()} == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    assert len(set(spec.tasks.values())) == 49  # push-v3 and push-back-v3 share a sentence, as in LeRobot
