"""One command trains on data sets that are read and normalised differently, and the checkpoint keeps how."""

import shutil

import pytest

from tests.data.cases.build import renamed
from tests.training.two_robots import mixed_config, write_wide
from vlaflow.cli import train as command
from vlaflow.cli.reading import ReadingOptions
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.weights import DatasetEntry
from vlaflow.errors import ConfigError
from vlaflow.evaluation import calibrate_sampler
from vlaflow.policies.base import Policy
from vlaflow.policies.mixing import robots_of
from vlaflow.policies.policy_config import Normalisation
from vlaflow.policies.provenance import reading_of
from vlaflow.policies.recipe import DataSpec, OpenedDataset
from vlaflow.training import planning


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide") / "wide")


def test_one_command_reads_each_of_several_data_sets_in_its_own_way(dataset, wide, tmp_path, capsys, monkeypatch):
    """Its columns, views and normalisation; and every robot with enough held-out episodes gets a calibrated sampler."""
    other, out = shutil.copytree(wide, tmp_path / "other"), tmp_path / "p"
    renamed(other, action="actions", observation__state="joints")
    monkeypatch.setattr(calibrate_sampler, "candidates", lambda model: ["dense:1"])
    words = ["baselines.flow", "--dataset", str(dataset), "--dataset", f"big={other}"]
    words += ["--key", "big:action=actions", "--key", "big:state=joints", "--view", "big:hand=wrist", "--view", "big:front"]
    own = ["--chunk-seconds", "0.3"]
    own += ["--set", "normalisation.big.action_normalisation=identity", "--set", "normalisation.big.state_clip=1.5"]
    small = ["--set", "policy.backbone.image_size=32", "--set", "policy.backbone.width=32", "--set", "max_excluded=1"]
    assert (
        command.main([*words, *own, *small, "--mixture", "robots", "--steps", "1", "--out", str(out), "--tracker", "none"]) == 0
    )
    said = capsys.readouterr().out
    assert "dataset: Calibrated the sampler on" in said
    assert "big: The sampler was not calibrated: Training held out 1 episode" in said
    sizes = {name: robot.action_spec.chunk_size for name, robot in Policy.of_all_robots(out).robots.items()}
    assert sizes == {"dataset": 3, "big": 6}
    narrow, broad = (Policy.from_pretrained(out, robot=name) for name in sizes)
    assert (broad.action_normalizer.mode, narrow.action_normalizer.mode) == ("identity", "quantile")
    assert [normalizer.clip for normalizer in broad.processor.state.robots] == [None, 1.5]
    assert set(broad.views) == {"hand", "front"}
    assert reading_of(out / "robots/big", other).action == ("actions",)
    assert reading_of(out / "robots/dataset", dataset) is None
    entry = DatasetEntry(str(other), "big", reading=reading_of(out / "robots/big", other))
    planned = planning.shape_of([DatasetEntry(str(dataset), "dataset"), entry])
    assert (planned.spec, planned.frames) == (DataSpec(4, 3, ("front", "hand")), len(Dataset.open(dataset)) + 32)


def test_what_is_said_of_one_data_set_goes_before_what_is_said_of_all():
    entries = [DatasetEntry("a", "a"), DatasetEntry("b", "b")]
    options = ReadingOptions(("action=x", "b:action=y"), ("front",), ("b:0.1", "0.2"))
    first, second = (entry.reading for entry in options.of_entries(entries))
    assert first == Reading(("x",), (), (("front", "front"),), 0.2)
    assert second == Reading(("y",), (), (("front", "front"),), 0.1)
    assert ReadingOptions(view=("b:front",)).of_entries(entries)[0].reading is None
    for key, named, what in (
        ("c:action=x", entries, "data set 'c', which is not given; .*a, b"),
        ("b:action=x", (), "reads one; write --key action=x"),
    ):
        with pytest.raises(ConfigError, match=what):
            ReadingOptions(key=(key,)).of_entries(named) if named else ReadingOptions(key=(key,)).reading()


def test_a_normalisation_without_effect_is_refused(dataset, wide):
    datasets = [OpenedDataset(DatasetEntry.parse(str(root)), Dataset.open(root), root.name) for root in (dataset, wide)]

    def with_own(given, **names):
        config = mixed_config(normalisation={name: Normalisation(**own) for name, own in names.items()})
        return robots_of(config.objective.policy, config, given)

    with pytest.raises(ConfigError, match=r"normalisation\.wid is about a data set that is not given; .*'wide'"):
        with_own(datasets, wid={"state_clip": 2.0})
    with pytest.raises(ConfigError, match=r"only one robot.*--set policy\.state_clip=\.\.\."):
        with_own(datasets[1:], wide={"state_clip": 2.0})
