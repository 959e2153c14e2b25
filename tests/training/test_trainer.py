"""The loop: the same bytes from the same seed, errors that name their samples, checkpoints that survive."""

import errno
import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training import ranks
from tests.training.small import CPU, Cut, Memory, Ragged, as_it_is, new_policy, tiny_config, weights
from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.policies import adapters
from vlaflow.policies.base import Policy
from vlaflow.policies.processor import Drawn
from vlaflow.policies.provenance import newest_state
from vlaflow.policies.stages import PolicyStage
from vlaflow.training import checkpoint, pieces
from vlaflow.training.divergence import DivergedError, Divergence
from vlaflow.training.loader import Held, Loader, mix
from vlaflow.training.metrics_log import read_log
from vlaflow.training.team import Team
from vlaflow.training.trainer import Trainer


def run(out, config=None, source=None, held=None, **options):
    config = config or tiny_config()
    stage = PolicyStage(new_policy(config))
    trainer = Trainer(stage, config, source or Memory(), held, out, tracker="none", **options)
    return trainer.run()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", tiny_config(seed=1))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_validation_and_checkpoints_do_not_touch_training(tmp_path):
    """Measuring borrows the module and saving reads it; neither may leave a trace."""
    run(tmp_path / "a", tiny_config(validate_every=1, checkpoint_every=1), held=Memory(9))
    run(tmp_path / "b", tiny_config(validate_every=100, checkpoint_every=100))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_global_generator_is_neither_read_nor_moved(tmp_path):
    before = torch.get_rng_state()
    run(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_folder_is_a_policy_with_averaged_weights(tmp_path):
    outcome = run(tmp_path / "p", card=lambda outcome: f"step {outcome.step}")
    assert outcome.finished
    policy = Policy.from_pretrained(tmp_path / "p")
    assert policy.card == "step 6"
    saved = load_file(tmp_path / "p/training/step-000006/average.safetensors")
    raw = load_file(tmp_path / "p/training/step-000006/weights.safetensors")
    own = dict(policy.model.named_parameters())
    assert all(torch.equal(own[name], average) for name, average in saved.items())
    assert not torch.equal(raw["backbone.state.weight"], saved["backbone.state.weight"])


def test_a_finished_run_is_left_alone(tmp_path):
    run(tmp_path / "p")
    before = weights(tmp_path / "p")
    assert run(tmp_path / "p").finished
    assert weights(tmp_path / "p") == before


def test_another_config_is_refused_by_its_first_difference(tmp_path):
    run(tmp_path / "p")
    with pytest.raises(ConfigError, match=r"config\.optim\.learning_rate = 0\.001, now it is 0\.002"):
        run(tmp_path / "p", tiny_config(optim=replace(tiny_config().optim, learning_rate=2e-3)))
    with pytest.raises(ConfigError, match="data = None, now it is 'b'"):
        run(tmp_path / "p", identity={"data": "b"})


def test_fresh_moves_the_old_checkpoint_aside(tmp_path):
    run(tmp_path / "p")
    before = weights(tmp_path / "p")
    run(tmp_path / "p", tiny_config(seed=1), fresh=True)
    assert weights(tmp_path / "p.before-1") == before
    assert weights(tmp_path / "p") != before


def hold(folder, say):
    with checkpoint.claimed(folder):
        say.send("in")
        time.sleep(60)


@pytest.mark.parametrize("options", [{}, {"fresh": True}])
def test_two_runs_do_not_train_into_one_folder(tmp_path, options):
    """Neither sweeps away what the other is writing; a run that was killed keeps nobody out."""
    run(tmp_path / "p", tiny_config(steps=2))
    held = weights(tmp_path / "p")
    inside, say = ranks.forked().Pipe(duplex=False)
    other = ranks.forked().Process(target=hold, args=(tmp_path / "p", say))
    other.start()
    assert inside.recv() == "in"
    (tmp_path / "p/.partial-other").mkdir()
    with pytest.raises(ConfigError, match="Another run is training into"):
        run(tmp_path / "p", **options)
    assert (tmp_path / "p/.partial-other").exists()
    assert weights(tmp_path / "p") == held
    other.kill()
    other.join()
    run(tmp_path / "p", tiny_config(steps=2), **options)


def test_a_run_keeps_others_out_until_it_ends(tmp_path, monkeypatch):
    loss = PolicyStage.loss

    def tried(self, *arguments):
        with pytest.raises(ConfigError, match="Another run"):
            checkpoint.require_free(tmp_path / "p")
        return loss(self, *arguments)

    monkeypatch.setattr(PolicyStage, "loss", tried)
    run(tmp_path / "p", tiny_config(steps=2))
    checkpoint.require_free(tmp_path / "p")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder .*p cannot be created \(.*file is a file\)\. Choose another --out"):
        run(tmp_path / "file/deeper/p")
    with (
        pytest.raises(ConfigError, match=r"cannot be created \(Not a directory\)"),
        checkpoint.claimed(tmp_path / "file/deeper/p"),
    ):
        pass


def test_a_foreign_policy_is_not_overwritten(tmp_path):
    new_policy(tiny_config()).save_pretrained(tmp_path / "p")
    with pytest.raises(ConfigError, match="would be overwritten"):
        run(tmp_path / "p")


def test_nan_stops_with_step_and_episodes_and_leaves_the_checkpoint(tmp_path):
    """Sample 23 is frame 3 of episode 2; the seed's order meets it after the first checkpoint."""
    source = Memory(40)
    config = tiny_config(steps=20)
    loader_order = np.concatenate([order_of(config, s) for s in range(10)])
    source.poisoned = int(loader_order[4 * 5])  # first sample of step 6
    with pytest.raises(
        DivergedError, match=rf"The loss is nan at step 6 of 20.*episode {source.poisoned // 10} frame"
    ) as error:
        run(tmp_path / "p", config, source)
    assert "The checkpoint of step 4 is untouched" in str(error.value)
    assert newest_state(tmp_path / "p")[0] == 4
    assert np.isfinite(Policy.from_pretrained(tmp_path / "p").model.backbone.state.weight.detach().numpy()).all()


def order_of(config, step):
    from vlaflow.data.mixture import Order

    return Order(40, config.global_batch_size, config.seed).indices(step)


def test_an_explosion_is_distinguished_from_a_bad_batch():
    divergence = Divergence(warm_up=10)
    assert all(divergence.complaint(step, 1.0 + step % 2, 1.0) is None for step in range(50))
    assert divergence.complaint(50, 90.0, 1.0) is None
    assert "jumped to 500" in divergence.complaint(51, 500.0, 1.0)
    assert "gradient's norm is inf" in divergence.complaint(52, 1.0, float("inf"))


@pytest.mark.parametrize("failing", ["weights.safetensors", "model.safetensors", "state.json"])
def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, monkeypatch, failing):
    """Whatever file is being written when the disk fills up."""
    out = tmp_path / "p"
    count = {"calls": 0}

    def full(real):
        def save(file, *args, **options):
            if file.name == failing:
                count["calls"] += 1
                if count["calls"] == 2:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, *args, **options)

        return save

    monkeypatch.setattr(pieces, "save_tensors", full(pieces.save_tensors))
    monkeypatch.setattr(checkpoint, "write_json", full(checkpoint.write_json))
    monkeypatch.setattr(adapters, "save_tensors", full(adapters.save_tensors))
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .*No space left.*step 2 is untouched"):
        run(out)
    monkeypatch.undo()
    Policy.from_pretrained(out)
    assert [p.name for p in out.iterdir() if p.name.startswith(checkpoint.PARTIAL)] == []
    run(out)
    run(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_while_the_last_policy_moves_into_place_loses_nothing(tmp_path, monkeypatch, moved):
    """The run is over by its step count, yet its policy is still that of the checkpoint before: starting again moves it."""
    out, done = tmp_path / "p", {"files": 0}
    real = type(out).replace

    class Killed(BaseException):
        pass

    def replace_until(self, target):
        if self.parent.name == "policy" and self.parent.parent.name == "step-000006":
            if done["files"] == moved:
                raise Killed
            done["files"] += 1
        return real(self, target)

    monkeypatch.setattr(type(out), "replace", replace_until)
    with pytest.raises(Killed):
        run(out)
    monkeypatch.undo()
    Policy.from_pretrained(out)
    assert run(out).finished
    run(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
    assert not (out / "training/step-000006/policy").exists()


def publish(out, step):
    """A checkpoint whose policy keeps a folder next to its files, as those with a tokenizer do."""

    def save_policy(folder):
        (folder / "processor").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "processor/tokenizer.json", f"processor/only-{step}.json"):
            (folder / name).write_text(str(step))

    checkpoint.publish(out, step, {"step": step}, {}, save_policy)


def published(out):
    files = [path for path in out.rglob("*") if path.is_file() and "training" not in path.parts[len(out.parts) :]]
    return {path.relative_to(out).as_posix(): path.read_text() for path in files}


def whole_policy(step):
    names = ("config.json", "model.safetensors", "processor/tokenizer.json", f"processor/only-{step}.json")
    return dict.fromkeys(names, str(step))


def test_a_policy_that_keeps_a_folder_is_replaced_whole(tmp_path):
    """The old folder's files go with it."""
    for step in (1, 2, 3):
        publish(tmp_path / "p", step)
        assert published(tmp_path / "p") == whole_policy(step)


@pytest.mark.parametrize("moved", range(4))
@pytest.mark.parametrize("fresh", [False, True])
def test_a_kill_while_a_policys_folder_moves_into_place_loses_nothing(tmp_path, monkeypatch, moved, fresh):
    """A kill before any rename: of the old folder out of the way, and of each new thing into place."""
    out, done = tmp_path / "p", {"renames": 0}

    class Killed(BaseException):
        pass

    def killed_late(real):
        def rename(self, target):
            if self.parent == out or self.parent.name == "policy":
                if done["renames"] == moved:
                    raise Killed
                done["renames"] += 1
            return real(self, target)

        return rename

    publish(out, 1)
    monkeypatch.setattr(type(out), "replace", killed_late(type(out).replace))
    monkeypatch.setattr(type(out), "rename", killed_late(type(out).rename))
    with pytest.raises(Killed):
        publish(out, 2)
    monkeypatch.undo()
    aside = checkpoint.prepare(out, fresh)
    assert published(aside if fresh else out) == whole_policy(2)


def test_a_checkpoint_that_cannot_be_moved_is_one_sentence(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError(errno.EACCES, "Permission denied", str(self))

    publish(tmp_path / "p", 1)
    monkeypatch.setattr(type(tmp_path), "rename", refused)
    with pytest.raises(CheckpointError, match=r"cannot be put in order \(Permission denied.*choose another --out"):
        checkpoint.prepare(tmp_path / "p", fresh=True)


def test_the_log_has_one_line_per_step_and_resumes_without_a_seam(tmp_path):
    out = tmp_path / "p"
    run(out, held=Memory(9))
    whole = read_log(out)
    assert [entry["step"] for entry in whole] == [1, 2, 3, 4, 5, 6]
    assert "validation" in whole[2]
    assert "validation" in whole[5]
    assert "validation" not in whole[0]

    crashed = tmp_path / "crashed"
    with pytest.raises(RuntimeError, match="cut"):
        run(crashed, source=Cut(Memory()), held=Memory(9))
    with (crashed / "training/log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line the kill cut short
    run(crashed, held=Memory(9))
    timeless = [{k: v for k, v in e.items() if k not in ("seconds", "samples_per_second")} for e in whole]
    again = [{k: v for k, v in e.items() if k not in ("seconds", "samples_per_second")} for e in read_log(crashed)]
    assert json.dumps(again) == json.dumps(timeless)


class MeanStage:
    """A loss without noise whose average over valid actions is known: half the squared error of one weight vector."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.uneven = False

    def prepare(self, batch):
        return batch

    def draw(self, batch, generator, shared):
        return Drawn()

    def loss(self, batch, drawn):
        error_BLD = batch.action_BLD - self.module(batch.observation.state_BS)[:, None]
        weight = batch.valid_BL.float()
        total = (error_BLD.square().sum(-1) * weight).sum() / weight.sum()
        return LossTerms(total, {"error": total.detach()})

    def after_step(self, step, shared):
        pass

    def to(self, device):
        self.module.to(device)

    def save(self, folder, weights=None, card=""):
        folder.mkdir()
        save_file(dict(weights), folder / "model.safetensors")


def test_accumulation_equals_one_batch(tmp_path):
    """Exact but for rounding, also where parts hold unequally many valid actions, for a loss that draws no masks."""
    whole, parts = tiny_config(ema_decay=None), tiny_config(ema_decay=None, accumulate=2)
    for name, config in (("whole", whole), ("parts", parts)):
        Trainer(MeanStage(), config, Ragged(), None, tmp_path / name, tracker="none").run()
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    for name in files[0]:
        torch.testing.assert_close(files[0][name], files[1][name], rtol=1e-5, atol=1e-6)
    logs = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_seeds_differ_by_every_number():
    seeds = {mix(a, b, c) for a in ("x", "y") for b in range(20) for c in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_loading_ahead_changes_no_sample():
    """In order, and after a jump as on resuming."""
    loaders = [Loader(Memory(), tiny_config(accumulate=2), Team(), CPU, as_it_is, ahead=ahead) for ahead in (False, True)]
    for step in (0, 1, 2, 7, 8):
        plain, ahead = (loader.step(step) for loader in loaders)
        for a, b in zip(plain, ahead, strict=True):
            assert torch.equal(a.batch.observation.images["front"], b.batch.observation.images["front"])
            assert torch.equal(a.batch.action_BLD, b.batch.action_BLD)
            assert a.drawn.numbers == b.drawn.numbers
    for loader in loaders:
        loader.close()


def test_processes_share_a_step_without_overlap():
    config = tiny_config(global_batch_size=12)
    parts = [Loader(Memory(), config, Team(rank, 3), CPU, as_it_is).step(0)[0].batch for rank in range(3)]
    samples = [tuple(pair) for b in parts for pair in zip(b.episode_B.tolist(), b.frame_B.tolist(), strict=True)]
    assert len(samples) == len(set(samples)) == config.global_batch_size


def test_held_out_batches_count_once_over_all_processes():
    held = Held(Memory(50), batch_size=8, seed=0)
    one = [part.batch.episode_B.tolist() for part, counted in held.parts(Team(), CPU, as_it_is) if counted]
    shares = [list(held.parts(Team(rank, 3), CPU, as_it_is)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    several = [part.batch.episode_B.tolist() for share in shares for part, counted in share if counted]
    assert sorted(one) == sorted(several)
    assert sum(map(len, one)) == 50


def test_training_learns(tmp_path):
    """Sixty steps on eight samples more than halve the loss of the constant answer (about 2)."""
    config = tiny_config(steps=60, global_batch_size=8, checkpoint_every=1000, validate_every=1000, shift=0, ema_decay=0.9)
    run(tmp_path / "p", replace(config, optim=replace(config.optim, learning_rate=1e-2)), Memory(8))
    losses = [entry["loss"] for entry in read_log(tmp_path / "p")]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:3]) / 3


def test_sigterm_between_the_parts_of_a_step_leaves_the_step_out(tmp_path, monkeypatch):
    """No more than a part is waited for, and the run continues to the bytes of one that was not interrupted."""
    config, loss, calls = tiny_config(accumulate=4, steps=4, checkpoint_every=4, ema_decay=None), PolicyStage.loss, []

    def ended(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * 4 + 2:  # in the second part of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *arguments)

    monkeypatch.setattr(PolicyStage, "loss", ended)
    outcome = run(tmp_path / "p", config)
    assert (outcome.signal, outcome.step, newest_state(tmp_path / "p")[0]) == (signal.SIGTERM, 2, 2)
    assert len(calls) == 2 * 4 + 2 + 1, "one more pass, over samples of the step, before it is saved"
    monkeypatch.undo()
    run(tmp_path / "p", config)
    run(tmp_path / "whole", config)
    assert weights(tmp_path / "p") == weights(tmp_path / "whole")


def test_a_hurried_checkpoint_keeps_the_earlier_policy_and_continues_to_the_same_end(tmp_path, monkeypatch):
    """What SIGTERM leaves of a sharded run: everything needed to go on, and the policy of the checkpoint before."""
    save = Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda self, part, hurried=False: save(self, part, hurried=self.step == 4))
    with pytest.raises(RuntimeError, match="cut"):
        run(tmp_path / "p", source=Cut(Memory(), at=5))
    monkeypatch.undo()
    assert newest_state(tmp_path / "p")[0] == 4
    run(tmp_path / "two", tiny_config(steps=6, checkpoint_every=2), source=Memory())
    averages = load_file(tmp_path / "p/training/step-000002/average.safetensors")
    policy = dict(Policy.from_pretrained(tmp_path / "p").model.named_parameters())
    assert all(torch.equal(policy[name], average) for name, average in averages.items())
    run(tmp_path / "p")
    assert weights(tmp_path / "p") == weights(tmp_path / "two")
