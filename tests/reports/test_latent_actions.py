"""The page of a latent action model."""

import html
import re

import numpy as np

from tests.data.toyset import without_actions
from tests.evaluation.latents import saved
from vlaflow.cli import data as command
from vlaflow.evaluation import latent_report
from vlaflow.reports import latent_actions


def test_the_page_averages_over_dimensions_that_move(root, tmp_path, capsys, monkeypatch):
    saved(root, tmp_path / "m")
    told = {name: np.array([0.5, np.nan, 0.25]) for name in ("codes", "vectors", "task", "chance")}
    monkeypatch.setattr(latent_report, "probes", lambda *given: told)
    out = tmp_path / "page.html"
    assert command.main(["latent-report", str(tmp_path / "m"), "--dataset", str(root), "--out", str(out)]) == 0
    assert "<td>0.50</td><td></td><td>0.25</td><td>0.38</td>" in out.read_text()
    assert "0.38 of the actions' variance" in "".join(capsys.readouterr().out)


def test_the_page_shows_every_pair_and_every_transfer(root, tmp_path, capsys):
    saved(root, tmp_path / "m")
    out = tmp_path / "pages/page.html"
    assert command.main(["latent-report", str(tmp_path / "m"), "--dataset", str(root), "--out", str(out)]) == 0
    page = html.unescape(out.read_text())
    rows = latent_report.ROWS
    assert len(re.findall(r'<img alt="" src="data:image/png;base64,', page)) == 5 * rows + rows * (rows + 1)
    for part in (
        "of 16",
        "perplexity",
        "Transfer to other first frames",
        "other pairs' codes",
        "dx",
        "Perplexity by position",
    ):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "")
    said = capsys.readouterr().out
    assert re.search(r"\d+ of 16 entries used, perplexity [\d.]+; the codes reconstruct", said)
    assert "of the actions' variance" in said


def test_without_actions_the_page_leaves_out_what_they_would_tell(root, tmp_path, capsys):
    without_actions(root)
    saved(root, tmp_path / "m")
    out = tmp_path / "page.html"
    assert command.main(["latent-report", str(tmp_path / "m"), "--dataset", str(root), "--out", str(out)]) == 0
    assert "Prediction of the actions" not in out.read_text()
    assert "variance" not in capsys.readouterr().out


def test_a_change_is_grey_where_there_is_none():
    image = np.full((2, 2, 3), 90, np.uint8)
    assert (latent_actions.difference(image, image) == 128).all()
    assert (latent_actions.difference(image + 20, image) > 128).all()
    assert (latent_actions.difference(image - 90, image + 160) == 0).all()
