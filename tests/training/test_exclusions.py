"""What pauses leave out of training is printed, and refused where it is more than the config allows."""

import shutil

import pytest

from tests.data.toyset import edit_table
from tests.training import flybot
from tests.training.test_run import arguments
from vlaflow.cli import train as command
from vlaflow.errors import ConfigError

ROWS = 6 * 9 + sum(range(6))


@pytest.fixture
def standing(dataset, tmp_path):
    """The first 19 rows move (its first two episodes), the other 50 hold still."""
    copy = shutil.copytree(dataset, tmp_path / "standing", ignore=shutil.ignore_patterns(".cache"))
    edit_table(copy / "data/chunk-000/file-000.parquet", "action", lambda rows: rows[:19] + [[0.0, 0.0]] * (ROWS - 19))
    return copy


def test_training_on_little_but_pauses_is_refused_with_the_keys_that_go_on(standing, tmp_path, capsys):
    more = ["--steps", "2", "--set", "policy.decoder.chunk_size=4", "--set", "policy.n_action_steps=2"]
    with pytest.raises(ConfigError, match=r"leave 5\d\.\d% of the actions .* --set pauses=none, .* --set max_excluded=1"):
        command.main([*arguments(standing, tmp_path / "p"), *more])
    assert not (tmp_path / "p").exists()
    assert command.main([*arguments(standing, tmp_path / "p"), *more, "--set", "max_excluded=1"]) == 0
    assert "Left out of the loss, as shares of the actions: 5" in capsys.readouterr().err
    assert command.main([*arguments(standing, tmp_path / "all"), *more, "--set", "pauses=none"]) == 0
    assert "in pauses" not in capsys.readouterr().err


def test_a_pipeline_refuses_before_its_first_stage_and_names_the_stage(standing, tmp_path):
    with pytest.raises(ConfigError, match=r"--set joint\.pauses=none.*--set joint\.max_excluded=1"):
        command.main(flybot.demo(standing, tmp_path / "p"))
    assert not (tmp_path / "p").exists()
