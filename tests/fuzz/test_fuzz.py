"""Damaged inputs are refused in a sentence, or read as what they are: a few in ``make test``, many in ``make fuzz``."""

import pytest

from tests.fuzz.judge import LOST, judge
from tests.fuzz.kinds import KINDS, Site, for_damages
from tests.fuzz.seeds import SEEDS

COUNTS = {"dataset": 20, "checkpoint": 10, "calibration": 15, "results": 30, "questions": 50, "message": 20}
"""Inputs per kind, so that all together take a few seconds."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return {kind: Site(KINDS[kind], tmp_path_factory.mktemp(kind) / "site") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_a_traceback_a_hang_or_taken_for_what_it_is_not(sites, kind):
    site = sites[kind]

    @for_damages(site, COUNTS[kind], 0)
    def every(hurt):
        outcome = judge(site, hurt)
        assert outcome.name not in LOST, f"{outcome.name}: {hurt!r}\n{outcome.said}"

    every()


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_that_was_ever_lost_is_lost_again(sites, kind):
    for hurt in SEEDS[kind]:
        outcome = judge(sites[kind], hurt)
        assert outcome.name not in LOST, f"{outcome.name}: {hurt!r}\n{outcome.said}"


def test_what_is_sound_is_not_refused(sites):
    """Otherwise nothing above would say anything."""
    for site in sites.values():
        for file in site.files:
            assert site.use(file) == site.expected(file)


def test_a_refusal_in_two_lines_or_another_value_of_another_type_counts_as_lost(sites, monkeypatch):
    site = sites["questions"]
    hurt = ("questions.jsonl#0", "set", ["kind"], "other")
    assert judge(site, hurt).name == "another"
    monkeypatch.setattr(Site, "use", lambda *_: "?")
    assert judge(site, ("questions.jsonl#0", "set", ["kind"], 7)).name == "changed"
    monkeypatch.setattr(Site, "use", lambda *_: 1 // 0)
    assert judge(site, hurt).name == "traceback"
