"""The demo recipe's first losses and a chunk, against the numbers kept in git (see ``baseline``)."""

import json

from tests.end_to_end import baseline


def test_the_demo_recipe_gives_the_numbers_that_are_kept(tmp_path):
    """Bit by bit on the machine of the file, within a tolerance elsewhere. Changed on purpose? baseline --write."""
    assert baseline.differences(baseline.measure(tmp_path), json.loads(baseline.FILE.read_text())) == []


def test_a_changed_loss_is_noticed():
    kept = json.loads(baseline.FILE.read_text())
    for machine in (baseline.machine_key(), "another"):
        there = {**kept, "machine": machine}
        assert baseline.differences(kept, there) == []
        assert baseline.differences({**kept, "losses": [1.01 * x for x in kept["losses"]]}, there)
