"""Parts from another distribution (``tests/plugin``) through the public commands, with nothing changed in vlaflow.

The distribution is installed as anybody would install it, into a folder of its own, so that the same commands can also be run
where it is missing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vlaflow.robot.client import Client

PLUGIN = Path(__file__).parents[1] / "plugin"
ROOT = PLUGIN.parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that ``pip install`` has put the plugin into."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, folder / "source")  # building leaves files behind
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    made = subprocess.run([*pip, "--target", folder / "site", source], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return folder / "site"


def environment(*folders):
    path = os.pathsep.join([*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def commands(env):
    """A function that runs ``vlaflow ...`` in one process of its own, and returns what became of it."""
    words = [sys.executable, "-m", "tests.commands"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:

        def run(*arguments):
            process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run


@pytest.fixture(scope="module")
def command(site):
    """Run ``vlaflow ...`` where the plugin is installed; it must succeed."""
    with commands(environment(site)) as run:

        def succeed(*arguments):
            done = run(*arguments)
            assert done["status"] == 0, done["said"]
            return done["printed"]

        yield succeed


@pytest.fixture(scope="module")
def elsewhere():
    """Run ``vlaflow ...`` where the plugin is not installed; returns the one sentence that it is refused with."""
    with commands(environment()) as run:

        def refused(*arguments):
            done = run(*arguments)
            assert done["status"] == 2, done["said"]
            (said,) = done["said"].strip().splitlines()
            return said

        yield refused


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """A checkpoint: the plugin's expert recorded in its simulator, its policy trained by its recipe."""
    folder = tmp_path_factory.mktemp("corridor")
    dataset, policy = folder / "dataset", folder / "policy"
    command("record", "--env", "corridor/all", "--episodes", 10, "--workers", 0, "--out", dataset)
    command("train", "corridor.demo", "--dataset", dataset, "--out", policy)
    return policy


@contextmanager
def served(*arguments, env):
    """The address of ``vlaflow serve ...``."""
    command = [sys.executable, "-m", "vlaflow", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
        said = []
        try:
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"serving: .*?(\w+://[\w.:]+)", line):
                    yield found[1]
                    break
            else:
                pytest.fail("".join(said))
        finally:
            server.terminate()
            server.stderr.read()


def test_its_simulator_keeps_all_promises(command):
    command("check", "env", "corridor/left", "corridor/right")


def test_its_recipe_is_listed_with_its_summary(command):
    assert re.search(r"corridor\.demo +Straight lines along a corridor", command("train", "--help"))


def test_its_policy_is_evaluated_with_its_compute_policy(command, trained, tmp_path):
    """Trained on its expert, the policy walks to the end that it is told to walk to."""
    computes = ("--compute", "dense", "--compute", "averaged:3")
    settings = ("--episodes", 3, "--no-videos", "--workers", 1, "--out", tmp_path / "eval")
    command("eval", trained, "--env", "corridor/all", *computes, *settings)
    found = json.loads((tmp_path / "eval/results.json").read_text())
    successes = {(one["env"], one["compute"]): one["successes"] for one in found["evaluations"]}
    assert set(successes) == {(f"corridor/{end}", name) for end in ("left", "right") for name in ("dense", "averaged:3")}
    assert sum(successes.values()) >= 10
    assert [one["nfe"] for one in found["latency"]] == [1, 3]


def test_its_compute_policy_is_among_those_that_a_check_runs(command, trained):
    assert "averaged" in command("check", "policy", trained)


def test_its_action_tokenizer_is_fitted_and_decodes_for_a_decoder_of_ours(command, elsewhere, trained, tmp_path):
    """The fitted one is in the checkpoint, which is refused where the kind is missing."""
    settings = ("--steps", 2, "--batch-size", 8, "--no-calibrate", "--set", 'policy.decoder.tokenizer={"kind": "KnotsFit"}')
    command("train", "baselines.fast_ar", "--dataset", trained.parent / "dataset", "--out", tmp_path / "policy", *settings)
    tokenizer = json.loads((tmp_path / "policy/config.json").read_text())["decoder"]["tokenizer"]
    assert (tokenizer["kind"], tokenizer["knots"], tokenizer["chunk_size"]) == ("KnotsTokenizer", 3, 16)
    settings = ("--episodes", 1, "--no-videos", "--workers", 0, "--out", tmp_path / "eval")
    command("eval", tmp_path / "policy", "--env", "corridor/left", *settings)
    said = elsewhere("eval", tmp_path / "policy", "--env", "metaworld/reach-v3", "--out", tmp_path / "other")
    assert "is 'KnotsTokenizer', which nothing installed provides" in said


def test_its_rater_is_trained_by_a_recipe_of_ours_and_refinement_asks_it(command, elsewhere, trained, tmp_path):
    """It rates the chunks of a flow, which ``refine`` regenerates below a threshold that no rating reaches: all of them."""
    dataset, settings = trained.parent / "dataset", ("--steps", 2, "--batch-size", 8, "--no-calibrate")
    command("train", "asyncvla.demo", "--dataset", dataset, "--out", tmp_path / "policy", *settings)
    rater = ("--policy", tmp_path / "policy", "--set", 'rater={"kind": "HorizonRaterConfig", "steepest": 4.0}')
    command("train", "asyncvla.rater", "--dataset", dataset, "--out", tmp_path / "rated", *rater, *settings[:4])
    config = json.loads((tmp_path / "rated/config.json").read_text())
    assert config["rater"] == {"kind": "HorizonRaterConfig", "steepest": 4.0}
    computes = ("--compute", "dense", "--compute", "refine:threshold=1+dense:10")
    settings = ("--episodes", 1, "--no-videos", "--workers", 0, "--out", tmp_path / "eval")
    command("eval", tmp_path / "rated", "--env", "corridor/left", *computes, *settings)
    found = json.loads((tmp_path / "eval/results.json").read_text())
    assert [one["nfe"] for one in found["latency"]] == [10, 20]
    said = elsewhere("eval", tmp_path / "rated", "--env", "metaworld/reach-v3", "--out", tmp_path / "other")
    assert "is 'HorizonRaterConfig', which nothing installed provides; installed: RaterConfig" in said
    said = elsewhere("train", "asyncvla.rater", "--dataset", dataset, "--out", tmp_path / "again", *rater)
    assert "'HorizonRaterConfig', which nothing installed provides" in said


def test_its_policy_is_served_to_its_client(site, trained):
    """The actions of a request with the layout's keys point to the end that is asked for."""
    image = np.full((16, 16, 3), 40, np.uint8)
    image[7:10, 6:9] = 255
    with (
        served(trained, "--observation-keys", "corridor", "--compute", "averaged", env=environment(site)) as address,
        Client(address) as client,
    ):
        ways = [
            client.infer({"camera": image, "position": np.array([0.5], np.float32), "task": f"go to the {end} end"})["actions"]
            for end in ("left", "right")
        ]
    assert [way.shape for way in ways] == [(4, 1)] * 2
    assert ways[0].mean() < 0 < ways[1].mean()


def test_its_checkpoint_is_refused_in_one_sentence_where_it_is_not_installed(elsewhere, trained, tmp_path):
    for arguments in (
        ("eval", trained, "--env", "metaworld/reach-v3", "--out", tmp_path / "eval"),
        ("serve", trained, "--observation-keys", "libero", "--port", "0"),
    ):
        said = elsewhere(*arguments)
        assert "'config.backbone.kind' in" in said
        assert "is 'GlanceConfig', which nothing installed provides; installed: " in said
        assert "TinyConfig" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "env", "corridor/left"),
        ("train", "corridor.demo", "--dataset", "nowhere", "--out", "nowhere"),
    ],
)
def test_its_names_are_unknown_where_it_is_not_installed(elsewhere, arguments):
    assert "corridor" in elsewhere(*arguments)
