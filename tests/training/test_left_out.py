"""What a policy's training left out of its loss, later stages and calibrations leave out, too."""

import shutil

import numpy as np
import pytest

from tests.data.toyset import TASKS, episode, writer
from vlaflow.cli.main import main
from vlaflow.data.lerobot import EXECUTED_KEY, Dataset
from vlaflow.data.quality import InterventionRule, PauseRule
from vlaflow.errors import ConfigError
from vlaflow.evaluation.calibrate import sample
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.provenance import LeftOut, left_out_by, trained_on
from vlaflow.training.options import Options
from vlaflow.training.run import train

SMALL = {
    "global_batch_size": "4",
    "validation_fraction": "0.4",
    "steps": "1",
}
NETWORK = {
    "policy.backbone.width": "32",
    "policy.backbone.heads": "2",
    "policy.backbone.ffn": "64",
    "policy.backbone.image_size": "32",
    "policy.exits": "none",
}
RULE = {"interventions.threshold": "3", "pauses": "none"}


def options(*changes):
    return Options({key: value for each in (SMALL, *changes) for key, value in each.items()}, tracker="none", threads=1)


def write(root, far):
    """Executed actions that are so far from the noted ones."""
    with writer(root) as out:
        for number, task in enumerate(TASKS):
            images, state, action = episode(number)
            out.add(images, state, action, task, extra={EXECUTED_KEY: action + np.float32(far)})
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """By the default rule, every action is an intervention."""
    return write(tmp_path_factory.mktemp("left out") / "noisy", 0.8)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("left out") / "policy"
    train("asyncvla.demo", dataset, out, options=options(NETWORK, RULE))
    return out


def test_a_rater_leaves_out_what_its_policy_did(trained, dataset, tmp_path):
    train("asyncvla.rater", dataset, tmp_path / "rated", policy=trained, options=options())
    expected = LeftOut(None, InterventionRule(threshold=3.0))
    assert left_out_by(trained) == left_out_by(tmp_path / "rated") == expected


def test_what_is_set_stays(trained, dataset, tmp_path):
    stated = {"interventions.threshold": "2", "pauses.minimum_s": "0.5"}
    train("asyncvla.rater", dataset, tmp_path / "rated", policy=trained, options=options(stated))
    assert left_out_by(tmp_path / "rated") == LeftOut(PauseRule(minimum_s=0.5), InterventionRule(threshold=2.0))


def test_other_data_are_judged_by_the_recipe(trained, tmp_path):
    """Another robot's units need another rule."""
    other = write(tmp_path / "other", 0.7)
    with pytest.raises(ConfigError, match="after interventions"):
        train("asyncvla.rater", other, tmp_path / "rated", policy=trained, options=options())


def test_an_export_takes_along_what_its_training_left_out(trained, dataset, tmp_path):
    """And all else that evaluations and later stages ask of the run, without its tensors."""
    assert main(["export", "lerobot", str(trained), "--out", str(tmp_path / "exported")]) == 0
    exported = local_folder(tmp_path / "exported")
    assert not (exported / "training").exists()
    assert left_out_by(exported) == left_out_by(trained)
    assert trained_on(exported) == trained_on(trained)
    assert len(trained_on(exported)) == 1
    train("asyncvla.rater", dataset, tmp_path / "rated", policy=exported, options=options())
    assert left_out_by(tmp_path / "rated") == left_out_by(trained)
    assert main(["export", "lerobot", str(exported), "--out", str(tmp_path / "again")]) == 0
    assert left_out_by(local_folder(tmp_path / "again")) == left_out_by(trained)


def test_calibrations_count_the_actions_that_training_counted(trained, dataset, tmp_path, capsys):
    data = Dataset.open(dataset)
    exported = shutil.copytree(trained, tmp_path / "exported", ignore=shutil.ignore_patterns("training"))
    kept = sample(Policy.from_pretrained(trained), data, range(5), 40).windows
    assert not capsys.readouterr().err
    default = sample(Policy.from_pretrained(exported), data, range(5), 40).windows
    assert f"{exported} holds no record of its training" in capsys.readouterr().err
    assert kept.batch(np.arange(5)).valid_BL.sum() > default.batch(np.arange(5)).valid_BL.sum()
