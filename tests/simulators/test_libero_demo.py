"""The demo on LIBERO, from nothing to a report; its rater and calibrations read what only LIBERO's experts record."""

import io
from contextlib import redirect_stdout

import pytest

from tests.simulators.libero_catalogue import needs_libero
from vlaflow.cli.main import main
from vlaflow.evaluation import results

pytestmark = [needs_libero, pytest.mark.xdist_group("libero")]


def test_the_demo_goes_from_nothing_to_a_report(tmp_path):
    out = tmp_path / "out"
    with redirect_stdout(io.StringIO()):
        assert main(["demo", "--plan", "libero", "--quick", "--out", str(out), "--workers", "0"]) == 0
    assert "exit:adaptive" in results.read(out / "results.json").computes
    assert (out / "report.html").is_file()
