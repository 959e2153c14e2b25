"""The LIBERO environment: bit by bit the stock one, only cheaper; and what it promises in addition."""

import logging
import subprocess
import sys

import numpy as np
import pytest

from tests.simulators.libero_catalogue import needs_libero
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.simulators import display, gl, make
from vlaflow.simulators.base import RANDOM_START
from vlaflow.simulators.checker import check_environment
from vlaflow.simulators.libero_tasks import CAMERAS

pytestmark = [needs_libero, pytest.mark.xdist_group("libero")]
TASK, SIZE, SEED = "object/3", 64, 1003
LARGE = 128
"""Of pictures that are compared by how they look."""


@pytest.fixture(scope="module")
def env():
    env = make(f"libero/{TASK}", size=SIZE)
    yield env
    env.close()


def actions(count, seed=0):
    """Random actions that press the hand down, so that it touches things."""
    found = np.random.default_rng(seed).uniform(-1, 1, (count, 7)).astype(np.float32)
    found[:, 2] -= 0.5
    return found


def flat(observation):
    return [*observation.images.values(), observation.state]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_states_successes_and_exact_images_are_those_of_the_stock_environment():
    """In a process of its own, because the stock environment's end takes every OpenGL context of its process with it."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.simulators.libero_stock", TASK, str(SIZE), str(SEED)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_pictures_taken_only_at_the_end_are_those_taken_all_the_time(env):
    seen = []
    for always in (True, False):
        env.restart(SEED)
        for action in actions(6):
            env.advance(action)
            if always:
                env.observe()
        seen.append(env.observe())
    assert same(*seen)


def test_seeds_select_stored_states_in_order_and_begin_again(env):
    assert [env.restart(1000 + i)["initial_state"] for i in (0, 7, 50)] == [0, 7, 0]
    assert env.restart(10_000, RANDOM_START)["initial_state"] == -1


def test_a_random_start_depends_on_its_seed_only(env):
    env.restart(10_000, RANDOM_START)
    first = env.observe()
    env.restart(10_001, RANDOM_START)
    other = env.observe()
    env.restart(1001)
    env.advance(np.ones(7))
    env.restart(10_000, RANDOM_START)
    assert same(first, env.observe())
    assert not np.array_equal(first.images["image"], other.images["image"])


def test_an_unknown_start_is_refused(env):
    with pytest.raises(ConfigError, match="'stored' or 'random'"):
        env.restart(1000, {"start": "middle"})


def test_a_placement_that_is_never_found_is_an_error_and_not_an_endless_loop(env, monkeypatch):
    from robosuite.utils.errors import RandomizationError

    def fail():
        raise RandomizationError

    monkeypatch.setattr(env.raw, "_reset_internal", fail)
    with pytest.raises(ConfigError, match="No placement without overlaps"):
        env.restart(10_000, RANDOM_START)


def test_a_missing_file_is_one_sentence(monkeypatch):
    from vlaflow.simulators import libero_tasks
    from vlaflow.simulators.libero_tasks import LiberoTask

    monkeypatch.setitem(libero_tasks.TASKS, TASK, LiberoTask("libero_object", "pick_up_the_moon", "pick up the moon"))
    with pytest.raises(CapabilityError, match=r"lacks .*pick_up_the_moon\.bddl; it is damaged: pip install"):
        make(f"libero/{TASK}")


def test_robosuite_opens_no_log_file(env):
    handlers = logging.getLogger("robosuite_logs").handlers
    assert not [handler for handler in handlers if isinstance(handler, logging.FileHandler)]


def test_the_environment_keeps_every_promise_of_the_interface(env):
    assert not [finding for finding in check_environment(env) if not finding.passed]


def test_views_come_as_a_dict_and_as_observations_with_the_same_pixels(env):
    observation, _ = env.reset(seed=SEED)
    observed = env.observe()
    assert list(observation["pixels"]) == list(env.views) == ["image", "wrist_image"]
    assert all(np.array_equal(observation["pixels"][view], observed.images[view]) for view in env.views)
    assert np.array_equal(env.render(), observed.images["image"])


def cameras(env, *, simplify=False):
    return gl.OffscreenCameras(env.raw.sim.model._model, tuple(CAMERAS.values()), LARGE, "fast", (0,), simplify=simplify)


def pictures_and_geoms(env, **how):
    taking = cameras(env, **how)
    now = taking.keep(env.raw.sim.data._data)
    found = [(taking.take(camera, now).astype(int), taking._scene.ngeom) for camera in CAMERAS.values()]
    taking.close()
    return [picture for picture, _ in found], [geoms for _, geoms in found]


def pictures(env, **how):
    return pictures_and_geoms(env, **how)[0]


def test_leaving_out_what_lies_outside_the_picture_changes_no_pixel(env, monkeypatch):
    env.restart(SEED)
    culled, few = pictures_and_geoms(env)
    monkeypatch.setattr(gl, "in_view", lambda model, data, camera: np.ones(model.ngeom, bool))
    whole, all_of_them = pictures_and_geoms(env)
    assert all(np.array_equal(a, b) for a, b in zip(culled, whole, strict=True))
    assert all(a < b for a, b in zip(few, all_of_them, strict=True))


def test_simplified_pictures_resemble_the_others(env):
    """Switching multisampling off alone changes pixels by 1.1 of 255 on average."""
    env.restart(SEED)
    for plain, simplified in zip(pictures(env), pictures(env, simplify=True), strict=True):
        assert np.abs(plain - simplified).mean() < 2
        assert not np.array_equal(plain, simplified)


def test_simplifying_leaves_the_model_as_it_was_and_moves_no_vertex_far(env):
    model = env.raw.sim.model._model
    names = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum", "tex_width", "tex_height")
    before = {name: getattr(model, name).copy() for name in (*names, "tex_data")}
    with display.simplified(model, LARGE):
        assert model.mesh_facenum.sum() < before["mesh_facenum"].sum() / 2
        for number in np.flatnonzero(model.mesh_facenum != before["mesh_facenum"]):
            vertices = slice(model.mesh_vertadr[number], model.mesh_vertadr[number] + model.mesh_vertnum[number])
            start = model.mesh_faceadr[number]
            faces = model.mesh_face[start : start + model.mesh_facenum[number]]
            corners, old = model.mesh_vert[vertices][faces].reshape(-1, 3), before["mesh_vert"][vertices]
            cell = max(display.FINEST / LARGE, display.COARSEST / LARGE * np.ptp(old, axis=0).max())
            assert (corners >= old.min(0) - 1e-6).all()
            assert (corners <= old.max(0) + 1e-6).all()
            moved = np.abs(model.mesh_vert[vertices] - old).max()
            assert 0 < moved <= cell * 1.001
    assert all(np.array_equal(getattr(model, name), value) for name, value in before.items())


def test_the_benchmark_compares_all_ways_with_the_stock_environment(env, monkeypatch, tmp_path):
    """Without the stock environment itself and with one of ours for all ways, for both take long to build."""
    import json

    from benchmarks import libero_rendering

    class Stock:
        def __init__(self, task, size):
            assert (task, size) == (TASK, 32)

        def do(self, what):
            return lambda: None

        def close(self):
            pass

    made = []
    monkeypatch.setattr(env, "close", lambda: None)
    monkeypatch.setattr(libero_rendering, "make", lambda name, **how: made.append((name, how)) or env)
    monkeypatch.setattr(libero_rendering, "Stock", Stock)
    file = tmp_path / "found.json"
    sizes = ["--steps", "2", "--size", "32", "--rounds", "1"]
    assert libero_rendering.main(["--envs", f"libero/{TASK}", *sizes, "--json", str(file)]) == 0
    assert made == [(f"libero/{TASK}", {"render": render, "size": 32}) for render in ("fast", "exact")]
    ways, resets = json.loads(file.read_text())["cases"]
    assert len(ways["arms"]) == 6
    assert any("stock" in way for way in ways["times_as_long_as_first"])
    assert resets["unit"] == "s"
