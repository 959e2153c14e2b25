"""What LeRobot gives and takes: its batches, its chunks and its checkpoint layout (recorded from lerobot 0.6.1)."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.small import SPEC, tiny_policy, tiny_stats
from vlaflow.cli.main import main
from vlaflow.compute.dense import Dense
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.errors import SpecError
from vlaflow.policies import lerobot
from vlaflow.policies.base import Policy
from vlaflow.policies.lerobot import Keys, as_pixels
from vlaflow.policies.seeds import chunk_generator
from vlaflow.spec import Observation

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/fixtures/lerobot_0_6_1"
PLUGIN = ROOT / "integrations/lerobot_policy_vlaflow/lerobot_policy_vlaflow"


@pytest.fixture(scope="module")
def policy():
    return Policy.create(tiny_policy(views=("front", "wrist")), SPEC, tiny_stats(), 0)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)


@pytest.fixture
def batch(image):
    """As LeRobot's loader and processors give it: float images with channels first, one task per sample."""
    planes = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    rng = np.random.default_rng(1)
    return {
        "observation.images.front": planes,
        "observation.images.wrist": planes.flip(0),
        "observation.state": torch.from_numpy(rng.standard_normal((2, 3), np.float32)),
        "action": torch.from_numpy(rng.uniform(-1, 1, (2, 4, 2)).astype(np.float32)),
        "action_is_pad": torch.tensor([[False] * 4, [False, False, True, True]]),
        "task": ["push", "pull"],
        "episode_index": torch.tensor([3, 5]),
        "frame_index": torch.tensor([0, 7]),
        "index": torch.tensor([30, 57]),
    }


def test_pixels_are_the_ones_that_were_stored(image):
    planes = torch.from_numpy(image).permute(0, 3, 1, 2)
    assert np.array_equal(as_pixels(planes.float() / 255).numpy(), image)
    assert np.array_equal(as_pixels(planes).numpy(), image)


@pytest.mark.parametrize(
    ("changed", "said"), [(lambda x: 2 * x - 1, "values from -1 to 1"), (lambda x: x[0], r"shape \(B, 3, height, width\)")]
)
def test_images_that_were_normalised_or_lack_an_axis_are_refused(changed, said):
    with pytest.raises(SpecError, match=said):
        as_pixels(changed(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)))


def test_a_batch_of_lerobots_is_one_of_ours(policy, batch, image):
    made = Keys.of(policy, {}).batch(batch, 3)
    assert np.array_equal(made.observation.images["front"].numpy(), image)
    assert made.observation.instructions == ["push", "pull"]
    assert made.valid_BL.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(made.action_BLD, batch["action"])
    assert made.episode_B.tolist() == [3, 5]
    images = {view: torch.from_numpy(x) for view, x in (("front", image), ("wrist", image[::-1].copy()))}
    observation = ObservationBatch(images, batch["observation.state"], ["push", "pull"])
    ours = Batch(observation, batch["action"], made.valid_BL, made.episode_B, made.frame_B)
    losses = [
        policy.loss(policy.prepare(each), torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)).total
        for each in (made, ours)
    ]
    assert losses[0].isfinite()
    assert torch.equal(*losses)


def test_keys_are_the_data_sets_own_where_they_are_known(policy, batch):
    keys = Keys.of(policy, {"wrist": "observation.images.hand", "roof": "observation.images.roof"})
    assert keys.views == {"front": "observation.images.front", "wrist": "observation.images.hand"}
    with pytest.raises(SpecError, match=r"no 'observation.images.hand', the policy's view 'wrist'.*--rename_map"):
        keys.batch(batch, 3)
    del batch["observation.state"]
    with pytest.raises(SpecError, match=r"no 'observation\.state'"):
        Keys.of(policy, {}).batch(batch, 3)


def test_chunks_are_those_of_act(policy, batch, image):
    observation = Keys.of(policy, {}).observation(batch, 3)
    chunk_BLD = lerobot.act(policy, observation, Dense(2), seed=4, number=1)
    own = [
        Observation({"front": image[row], "wrist": image[1 - row]}, batch["observation.state"][row].numpy(), words)
        for row, words in enumerate(("push", "pull"))
    ]
    wanted = policy.act(own, Dense(2), generator=[chunk_generator(4 + row, 1) for row in range(2)])
    assert np.array_equal(chunk_BLD.numpy(), np.stack([chunk.actions for chunk in wanted]))
    assert not torch.equal(chunk_BLD, lerobot.act(policy, observation, Dense(2), seed=4, number=2)), "each chunk has its noise"


def test_a_chunk_begins_with_the_actions_that_are_executed_meanwhile(policy, batch):
    one = {key: value[:1] for key, value in batch.items()}
    observation = Keys.of(policy, {}).observation(one, 3)
    rest = torch.tensor([[0.25, -0.5], [0.5, 0.125], [0.0, 0.75]])
    for committed in (rest, rest[None]):
        chunk_BLD = lerobot.act(policy, observation, Dense(2), seed=0, number=0, committed=committed, delay=2)
        assert torch.equal(chunk_BLD[0, :2], rest[:2])
    fresh_BLD = lerobot.act(policy, observation, Dense(2), seed=0, number=0)
    for nothing in (rest[:0], torch.zeros(10, 2)):
        assert torch.equal(fresh_BLD, lerobot.act(policy, observation, Dense(2), seed=0, number=0, committed=nothing, delay=2))


def test_zeros_after_the_rest_of_a_chunk_are_not_committed_and_a_long_delay_commits_what_can_be_continued(policy, batch):
    """lerobot-rollout fills the rest up to its execution horizon, and takes the longest delay of the run."""
    observation = Keys.of(policy, {}).observation({key: value[:1] for key, value in batch.items()}, 3)
    rest = torch.tensor([[0.25, -0.5], [0.0, 0.0], [0.5, 0.125]])
    filled = torch.cat((rest[:2], torch.zeros(8, 2)))
    one, other = (
        lerobot.act(policy, observation, Dense(2), seed=0, number=0, committed=given, delay=1) for given in (rest[:1], filled)
    )
    assert torch.equal(one, other)
    whole = torch.cat((rest, rest, rest))
    chunk_BLD = lerobot.act(policy, observation, Dense(2), seed=0, number=0, committed=whole, delay=9)
    assert torch.equal(chunk_BLD[0, :3], whole[:3])


def test_an_exported_checkpoint_has_lerobots_layout_and_opens_here(policy, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy/training").mkdir()
    out = tmp_path / "out"
    assert main(["export", "lerobot", str(tmp_path / "policy"), "--out", str(out)]) == 0
    assert "of type vlaflow_asyncvla" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        *sorted(p.name for p in RECORDED.glob("policy_*")),
        "vlaflow",
    ]
    assert not (out / "vlaflow/training").exists()
    again = Policy.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), again.model.parameters(), strict=True))
    assert main(["export", "lerobot", str(tmp_path / "policy"), "--out", str(out)]) == 2
    assert "exists. Choose another --out." in capsys.readouterr().err


def test_the_json_files_are_those_that_lerobot_writes(policy):
    """The recorded policy has one view; its features and settings are its own, everything else is equal."""
    made = lerobot.layout(policy)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        recorded = json.loads((RECORDED / name).read_text())
        for step in (*recorded["steps"], *made[name]["steps"]):
            step.pop("state_file", None)  # of statistics, which the identity does not need
            if "features" in step["config"]:
                step["config"]["features"] = {
                    key: one["type"] for key, one in step["config"]["features"].items() if "image" not in key
                }
        assert made[name] == recorded
    config, recorded = made["config.json"], json.loads((RECORDED / "config.json").read_text())
    assert config.keys() == recorded.keys()
    assert config["input_features"]["observation.images.front"] == {"type": "VISUAL", "shape": [3, 32, 32]}
    assert config["input_features"]["observation.state"] == {"type": "STATE", "shape": [3]}
    own = {"input_features", "output_features", "recipe", "views", "chunk_size", "n_action_steps"}
    assert {key: config[key] for key in config.keys() - own} == {key: recorded[key] for key in recorded.keys() - own}


def test_every_type_has_what_lerobot_looks_for_by_its_name():
    """Config class, policy class and processor function, in modules whose names differ only in their beginnings."""
    trees = {
        kind: ast.parse((PLUGIN / f"{kind}_vlaflow.py").read_text()) for kind in ("configuration", "modeling", "processor")
    }
    registered = {
        decorator.args[0].value: node.name
        for node in ast.walk(trees["configuration"])
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "PreTrainedConfig.register_subclass"
    }
    assert registered.keys() == {*lerobot.TYPES.values(), lerobot.OTHER}
    classes = {node.name for node in ast.walk(trees["modeling"]) if isinstance(node, ast.ClassDef)}
    names = {node.id for node in ast.walk(trees["processor"]) if isinstance(node, ast.Name)}
    for kind, config in registered.items():
        assert config.removesuffix("Config") + "Policy" in classes
        assert f"make_{kind}_pre_post_processors" in names
