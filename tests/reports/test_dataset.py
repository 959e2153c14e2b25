"""The page of a data set needs nothing but itself."""

import base64
import re

import pytest

from tests.data.toyset import episode, writer
from vlaflow.cli.data import main
from vlaflow.errors import ConfigError
from vlaflow.reports.dataset import chosen_episodes


def test_page_is_self_contained(tmp_path):
    """No address is referred to; each chosen episode has one PNG inside; words of the data are escaped."""
    root = tmp_path / "set"
    with writer(root) as out:
        for i, task in enumerate(["push <b>it</b> & go", "open the drawer", "push <b>it</b> & go"]):
            out.add(*episode(i), task)
    assert main(["show", str(root), "--out", str(tmp_path / "page.html"), "--episodes", "2"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    pictures = re.findall(r'base64,([A-Za-z0-9+/=]+)"', page)
    assert len(pictures) == 2
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert "push &lt;b&gt;it&lt;/b&gt; &amp; go" in page
    assert "open the drawer" in page


def test_page_may_be_a_png_and_nothing_else(copy, tmp_path):
    assert main(["show", str(copy), "--out", str(tmp_path / "page.png"), "--episodes", "1"]) == 0
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.html or \.png"):
        main(["show", str(copy), "--out", str(tmp_path / "page.pdf")])


def test_every_task_is_shown_before_any_twice(dataset):
    assert chosen_episodes(dataset, 2) == [0, 1]
    assert chosen_episodes(dataset, 99) == [0, 1, 2, 3, 4]
