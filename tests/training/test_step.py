"""A step on a GPU waits for nothing, its format is that of its run, and its loss can be compiled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.reads import Reads
from tests.training.small import Memory, new_policy, tiny_config, weights
from vlaflow.errors import ConfigError
from vlaflow.policies.provenance import run_of
from vlaflow.policies.stages import PolicyStage
from vlaflow.training import loss_module, precision
from vlaflow.training.divergence import DivergedError, Interrupt
from vlaflow.training.loss_module import can_compile
from vlaflow.training.metrics_log import read_log
from vlaflow.training.team import ALONE
from vlaflow.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer(out, *, source=None, config=None, **options):
    config = config or tiny_config()
    return Trainer(PolicyStage(new_policy(config)), config, source or Memory(), None, out, tracker="none", **options)


@pytest.mark.parametrize("late", [True, False])
def test_a_step_reads_nothing_back_from_the_device(late, tmp_path):
    """The loader's thread, in which samples are counted and drawn for, is beyond these modes, as it is beside a GPU's work.

    A step on a CPU, whose loss is read at once, shows that reading is seen.
    """
    made = trainer(tmp_path / "p", config=tiny_config(accumulate=2), late=late)
    made._begin()
    made._one_step(Interrupt())  # the optimiser's first step makes its moments
    made.step = 1
    with Reads() as reads:
        made._one_step(Interrupt())
    made._loader.close()
    assert (reads.count == 0) is late


def test_a_loss_that_is_read_late_is_the_same(tmp_path):
    """Losses, weights and the log's order are those of a loss that is read at once."""
    for name, late in (("late", True), ("once", False)):
        trainer(tmp_path / name, late=late).run()
    late, once = (load_file(tmp_path / name / "model.safetensors") for name in ("late", "once"))
    assert all(torch.equal(late[name], tensor) for name, tensor in once.items())
    logs = [[(entry["step"], entry["loss"]) for entry in read_log(tmp_path / name)] for name in ("late", "once")]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_what_diverged_is_named_by_its_own_step_although_it_is_read_late(tmp_path):
    """A poisoned sample of step 2 is noticed when step 3 is under way: it is neither saved nor blamed on step 3."""
    config = tiny_config(checkpoint_every=4)
    poisoned = int(trainer(tmp_path / "q", config=config)._order(40, 4, config.seed).indices(1)[0])
    said = []
    for late in (True, False):
        with pytest.raises(DivergedError, match=r"at step 2 of 6\. Its samples: .* Nothing was saved yet") as refused:
            trainer(tmp_path / "p", source=Memory(poisoned=poisoned), config=config, late=late).run()
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_without_a_largest_norm_the_gradient_is_measured_and_not_clipped(tmp_path):
    for name, largest in (("none", None), ("huge", 1e9), ("small", 0.01)):
        optim = replace(tiny_config().optim, clip_norm=largest)
        trainer(tmp_path / name, config=tiny_config(steps=3, optim=optim)).run()
    assert weights(tmp_path / "none") == weights(tmp_path / "huge") != weights(tmp_path / "small")
    assert all(entry["gradient"] > 0.01 for entry in read_log(tmp_path / "none"))


def test_a_continued_run_keeps_its_format(tmp_path, monkeypatch):
    """The first process measured that bf16 is faster, the second the opposite: the run stays what it was."""
    config = tiny_config(precision="auto", steps=2)
    monkeypatch.setattr(precision, "speed_of_bf16", lambda threads: 2.0)
    trainer(tmp_path / "p", config=config).run()
    assert run_of(tmp_path / "p")["computes_in"] == "bf16"
    monkeypatch.setattr(precision, "speed_of_bf16", lambda threads: 0.5)
    more = trainer(tmp_path / "p", config=config)
    more._begin()
    assert more.format == "bf16"
    fresh = trainer(tmp_path / "other", config=config)
    fresh._begin()
    assert fresh.format == "fp32"
    with pytest.raises(ConfigError, match=r"computes_in = 'bf16', now it is 'fp32'"):
        trainer(tmp_path / "p", config=replace(config, precision="fp32")).run()


@pytest.mark.parametrize(("speed", "format"), [(0.7, "fp32"), (1.05, "fp32"), (1.47, "bf16")])
def test_auto_is_bf16_where_it_is_faster(speed, format, monkeypatch):
    monkeypatch.setattr(precision, "speed_of_bf16", lambda threads: speed)
    assert precision.chosen_format("auto", CPU) == format
    assert [precision.chosen_format(asked, CPU) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_a_loss_is_one_graph_and_the_same_when_compiled():
    """Nothing in it is random or read back, so nothing breaks the graph; draws are those of the uncompiled loss."""
    policy = new_policy(tiny_config())
    policy.model.train()
    stage, batch = PolicyStage(policy), Memory().batch(np.arange(4))
    ready = stage.prepare(batch)
    drawn = stage.draw(ready, torch.Generator().manual_seed(0), torch.Generator())
    compiled = torch.compile(stage.loss, backend="eager", fullgraph=True)
    found = []
    for loss in (stage.loss, compiled):
        policy.model.zero_grad(set_to_none=True)
        total = loss(ready, drawn).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in policy.model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)  # sums in another order


def test_without_a_compiler_training_goes_on_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not can_compile(CPU, ALONE)
    assert "the C++ compiler 'no-such-compiler', which this machine lacks" in capsys.readouterr().err
    monkeypatch.setattr(loss_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert can_compile(CPU, ALONE)
    assert not capsys.readouterr().err
