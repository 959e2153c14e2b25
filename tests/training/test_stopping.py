"""Early stopping: the best weights are kept, an interrupted run ends with the same ones, and an ended run stays ended."""

import json
import signal
from dataclasses import replace

import pytest

from tests.training.small import Cut, Ended, Memory, tiny_config, weights
from tests.training.test_trainer import run
from vlaflow.errors import CheckpointError, ConfigError, StorageError
from vlaflow.policies.early_stop import EarlyStop
from vlaflow.policies.recipe import OptimConfig
from vlaflow.training import checkpoint
from vlaflow.training.metrics_log import read_log
from vlaflow.training.stopping import Best, kept_settings
from vlaflow.training.trainer import Trainer

HELD_OUT = (3.0, 1.0, 2.0, 1.5, 0.5, 0.4)
"""By step: the second is the best until patience ends after the fourth, and better ones would have followed."""
CONSTANT = OptimConfig(learning_rate=1e-3, warmup_steps=2, schedule="constant")


def config(**changes):
    return tiny_config(optim=CONSTANT, validate_every=1, checkpoint_every=100, stop=EarlyStop(patience=2), **changes)


def card(outcome):
    return f"step {outcome.step}: {outcome.validation}"


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(Trainer, "_validate", lambda self: {"loss": HELD_OUT[self.step - 1], "velocity": -float(self.step)})


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The weights after the best step, of a run that ends there."""
    out = tmp_path_factory.mktemp("best") / "p"
    run(out, tiny_config(optim=CONSTANT, steps=2))
    return weights(out)


def test_the_checkpoint_holds_the_best_weights_and_not_the_last(tmp_path, scripted, best):
    outcome = run(tmp_path / "p", config(), held=Memory(9), card=lambda outcome: f"step {outcome.step}")
    assert (outcome.step, outcome.best, outcome.finished) == (4, 2, True)
    assert weights(tmp_path / "p") == best
    assert (tmp_path / "p/README.md").read_text() == "step 2"
    assert run(tmp_path / "p", config(), held=Memory(9)).step == 4  # and it stays ended
    assert weights(tmp_path / "p") == best


def test_a_run_that_breaks_down_after_the_best_step_ends_with_the_same_weights(tmp_path, scripted, best):
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "p", config(), source=Cut(Memory(), at=4), held=Memory(9))
    outcome = run(tmp_path / "p", config(), held=Memory(9))
    assert (outcome.step, outcome.best) == (4, 2)
    assert weights(tmp_path / "p") == best
    assert [entry["validation"]["loss"] for entry in read_log(tmp_path / "p")] == [*HELD_OUT[:4]]


@pytest.mark.parametrize(("at", "every"), [(1, 100), (2, 100), (3, 100), (1, 1)])
def test_a_run_that_is_told_to_end_before_a_validation_makes_up_for_it(tmp_path, scripted, best, at, every):
    settings = replace(config(), checkpoint_every=every)
    told = run(tmp_path / "p", settings, source=Ended(Memory(), at), held=Memory(9), card=card)
    assert (told.signal, told.step, len(read_log(tmp_path / "p"))) == (signal.SIGTERM, at + 1, at + 1)
    outcome = run(tmp_path / "p", settings, held=Memory(9), card=card)
    assert (outcome.step, outcome.best, outcome.finished) == (4, 2, True)
    assert weights(tmp_path / "p") == best
    assert (tmp_path / "p/README.md").read_text() == "step 2: 1.0"
    assert [entry["validation"]["loss"] for entry in read_log(tmp_path / "p")] == [*HELD_OUT[:4]]
    assert run(tmp_path / "p", settings, held=Memory(9)).best == 2


@pytest.mark.parametrize("name", ["write_json", "_move_up"])
def test_what_a_validation_that_is_made_up_for_changes_survives_a_full_disk(tmp_path, scripted, best, monkeypatch, name):
    run(tmp_path / "p", config(), source=Ended(Memory(), 1), held=Memory(9), card=card)
    usual = getattr(checkpoint, name)

    def full(*given):
        if (tmp_path / "p/training/step-000002/policy").exists():
            raise StorageError("the disk is full")
        usual(*given)

    monkeypatch.setattr(checkpoint, name, full)
    with pytest.raises(CheckpointError, match="the one of step 2 is untouched"):
        run(tmp_path / "p", config(), held=Memory(9), card=card)
    monkeypatch.setattr(checkpoint, name, usual)
    outcome = run(tmp_path / "p", config(), held=Memory(9), card=card)
    assert (outcome.step, outcome.best) == (4, 2)
    assert weights(tmp_path / "p") == best
    assert (tmp_path / "p/README.md").read_text() == "step 2: 1.0"


def test_a_training_state_that_does_not_say_whether_a_validation_is_missing_is_continued(tmp_path, scripted):
    run(tmp_path / "p", config(), source=Ended(Memory(), 1), held=Memory(9))
    file = tmp_path / "p/training/step-000002/state.json"
    state = json.loads(file.read_text())
    del state["owes"]
    file.write_text(json.dumps(state))
    assert run(tmp_path / "p", config(), held=Memory(9)).finished


def test_a_run_that_improves_to_the_end_takes_all_its_steps(tmp_path, scripted):
    settings = tiny_config(optim=CONSTANT, validate_every=1, stop=EarlyStop(patience=1, measure="velocity"))
    outcome = run(tmp_path / "p", settings, held=Memory(9))
    assert (outcome.step, outcome.best, outcome.finished) == (6, None, True)


def test_what_cannot_be_measured_is_refused(tmp_path, scripted):
    with pytest.raises(ConfigError, match="stop=none"):
        run(tmp_path / "p", config())
    with pytest.raises(ConfigError, match=r"stop\.measure is 'speed'"):
        run(tmp_path / "q", tiny_config(stop=EarlyStop(measure="speed"), validate_every=1), held=Memory(9))


def test_validations_that_decide_cannot_be_moved_when_a_run_continues():
    """Without early stopping they change nothing and may."""
    every = {"validate_every": 1, "checkpoint_every": 2, "stop": {"patience": 2}}
    assert kept_settings(every) == {"validate_every": 1, "stop": {"patience": 2}}
    assert kept_settings({**every, "stop": None}) == {"stop": None}


def test_without_a_rule_nothing_is_kept_from_an_earlier_step():
    best = Best(None)
    best.update(3, {})
    assert (best.over, best.due(3), best.keeps(3)) == (False, False, False)
