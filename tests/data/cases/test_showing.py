"""Words of a data set are shown as they are, and what is odd about its numbers is said."""

import numpy as np
import pytest

from tests.data.cases import build
from tests.data.toyset import edit_table
from vlaflow.cli.data import main
from vlaflow.data.check import check
from vlaflow.data.lerobot import Dataset
from vlaflow.data.stats import compute
from vlaflow.data.transforms import MODES, Normalizer, floors
from vlaflow.reports.dataset import plain


def say(root, task):
    """Every episode gets this instruction."""
    edit_table(root / "meta/tasks.parquet", "task", lambda tasks: [task, *tasks[1:]])
    edit_table(root / build.EPISODES, "tasks", lambda tasks: [[task] if t == ["push the puck"] else t for t in tasks])


@pytest.mark.parametrize("task", ["pick [red] [/] cube", "press [bold]", "drop the :cat:"])
def test_task_markup_is_printed_as_text(new, task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    say(new, task)
    assert main(["show", str(new)]) == 0
    assert task in capsys.readouterr().out


@pytest.mark.parametrize("task", ["pay $5 and $10", "a $\\frac{", "costs $"])
def test_task_dollar_is_drawn_as_text(new, task, tmp_path):
    say(new, task)
    assert main(["show", str(new), "--out", str(tmp_path / "page.html"), "--episodes", "1"]) == 0
    assert task in (tmp_path / "page.html").read_text()


def test_no_dollar_begins_a_formula():
    from matplotlib.text import Text

    for text in ("pay $5 and $10", "costs $", "plain"):
        drawn, formula = Text(text=plain(text))._preprocess_math(plain(text))
        assert (drawn, formula) == (text, False)


def test_nearly_constant_is_noted_and_has_a_floor(new):
    """A dimension that jitters by 1e-5 among others that move by 1: 0.03 away from it is not thousands of deviations."""
    jitter = np.random.default_rng(0).normal(0, 1e-5, build.ROWS)
    edit_table(new / build.DATA, "observation.state", lambda rows: [[r[0], j] for r, j in zip(rows, jitter, strict=True)])
    dataset = Dataset.open(new)
    assert "state: dimension 'y' is nearly constant (deviation 9e-06" in " ".join(check(dataset).remarks)
    stats = compute(dataset)["state"]
    for mode in MODES[1:]:
        normalizer = Normalizer.from_stats(stats, mode)
        assert normalizer.scale[1] == floors(stats)[1]
        assert 0.03 / normalizer.scale[1] < 100
        assert normalizer.scale[0] == Normalizer.from_stats(compute(Dataset.open(new))["state"], mode).scale[0]


def test_notes_of_opening_are_remarks_of_the_check(new):
    build.depth_png16(new)
    assert "'observation.images.range' is not used as a camera" in " ".join(check(Dataset.open(new)).remarks)
