"""Provenance: versions and the command line."""

import sys
from importlib import metadata

from vlaflow.versions import command_line, versions


def test_versions_are_those_of_the_installed_packages():
    found = versions()
    assert list(found)[:2] == ["vlaflow", "python"]
    assert found["torch"] == metadata.version("torch")


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr("vlaflow.versions.PACKAGES", ("torch", "no-such-package"))
    assert list(versions()) == ["vlaflow", "python", "torch"]


def test_the_command_line_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/vlaflow", "eval", "a folder/x", "--episodes", "20"])
    assert command_line() == "vlaflow eval 'a folder/x' --episodes 20"


def test_no_record_holds_a_token(monkeypatch):
    """Results and reports are shown around."""
    for words in (["--token", "secret"], ["--token=secret"]):
        monkeypatch.setattr(sys, "argv", ["vlaflow", "eval-realtime", *words, "--seed", "3"])
        assert command_line().replace("=", " ") == "vlaflow eval-realtime --token TOKEN --seed 3"
