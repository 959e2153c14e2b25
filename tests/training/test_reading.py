"""Training on data sets whose columns have other names: what was said once is kept with the checkpoint."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.cases.build import renamed
from tests.data.toyset import edit_info
from tests.training.small import SPEC
from tests.training.test_run import arguments
from vlaflow.cli import data as data_command
from vlaflow.cli import train as command
from vlaflow.config import to_json
from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError, DataError
from vlaflow.evaluation import calibrate
from vlaflow.evaluation.calibrate import ByShares, Request
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import reading_of

KEYS = ("--key", "action=actions", "--key", "state=joints", "--view", "eye=front")


@pytest.fixture(scope="module")
def strange(dataset, tmp_path_factory):
    """The data set with other names of its columns, and a clock that strays."""
    root = shutil.copytree(dataset, tmp_path_factory.mktemp("strange") / "dataset")
    renamed(root, action="actions", observation__state="joints")
    edit_info(root, x_vlaflow={"action_spec": to_json(SPEC)})
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        stamps = table["timestamp"].to_numpy() + np.where(table["frame_index"].to_numpy() % 2, 0.03, 0.0)
        place = table.column_names.index("timestamp")
        pq.write_table(table.set_column(place, "timestamp", [stamps.astype(np.float32)]), path)
    return root


@pytest.fixture(scope="module")
def trained(strange, tmp_path_factory):
    out = tmp_path_factory.mktemp("strange") / "policy"
    assert command.main([*arguments(strange, out, *KEYS, "--tolerance-s", "0.04"), "--steps", "2"]) == 0
    return out


def test_the_checkpoint_knows_how_its_data_were_read(trained):
    assert reading_of(trained, strange) == Reading(("actions",), ("joints",), (("eye", "front"),), 0.04)
    assert tuple(Policy.from_pretrained(trained).model.backbone.views) == ("eye",)


def test_the_options_that_the_refusal_names_are_those_of_the_command(strange, tmp_path):
    with pytest.raises(DataError, match="--key action=actions"):
        command.main(arguments(strange, tmp_path / "policy"))


def test_a_finished_run_and_later_stages_need_not_be_told_again(strange, trained, tmp_path):
    assert command.main([*arguments(strange, trained), "--steps", "2"]) == 0
    words = ["asyncvla.rater", "--dataset", str(strange), "--out", str(tmp_path / "rated"), "--policy", str(trained)]
    own = ["--steps", "1", "--batch-size", "4", "--tracker", "none", "--no-calibrate"]
    assert command.main([*words, *own]) == 0
    assert reading_of(tmp_path / "rated", strange) == reading_of(trained, strange)


def test_a_run_is_not_continued_on_other_columns(strange, trained):
    with pytest.raises(ConfigError, match="reading"):
        command.main(arguments(strange, trained, *KEYS, "--tolerance-s", "0.05"))


def test_calibration_opens_the_data_as_the_training_did(strange, trained):
    with pytest.raises(ConfigError, match="as the only exit"):  # which is said after the data set was opened
        calibrate.run(trained, strange, Request("one", ByShares("gamma", 0.4, True)))


def test_notes_of_the_reader_are_printed(strange, tmp_path, capsys):
    """Timestamps 0.03 s away from their frames are beyond a quarter of 0.1 s, but within --tolerance-s."""
    with pytest.raises(DataError, match="--tolerance-s"):
        command.main(arguments(strange, tmp_path / "policy", *KEYS))
    assert command.main([*arguments(strange, tmp_path / "policy", *KEYS, "--tolerance-s", "0.04"), "--steps", "1"]) == 0
    assert "Note: " in capsys.readouterr().err
    assert data_command.main(["check", str(strange), *KEYS, "--tolerance-s", "0.04"]) == 0
