"""The training loop: one for every stage, from one CPU process to many GPUs (through ``accelerate launch``).

A run is a function of its config, its data and the step number. Everything random in a step is drawn from generators that
the step number seeds (see ``loader``), so a run that was killed and continued ends with the same bytes as one that was not.

A step's parts, over all processes, are weighted by how many valid actions they hold. That is exact for losses that average over
valid actions, and right on average where random masks thin them out further. So the result does not depend on how the parts are
spread over processes, but for the order in which sums are formed.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, Tensor, nn

from vlaflow.config import to_json
from vlaflow.data.batch import LossName, moved
from vlaflow.data.mixture import Order
from vlaflow.data.source import MakeOrder, Source
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.io import first_not_finite
from vlaflow.policies.adapters import adapt, digest
from vlaflow.policies.provenance import newest_state, run_of
from vlaflow.policies.recipe import TrainConfig
from vlaflow.policies.stages import CoTraining, Stage
from vlaflow.progress import Silent, progress
from vlaflow.stacks.base import blocks_of
from vlaflow.training import checkpoint, sharding
from vlaflow.training.divergence import DivergedError, Divergence, Interrupt, diverged, untouched
from vlaflow.training.ema import Ema
from vlaflow.training.loader import Held, Loader, StepPart, alternating, held_out_losses, mix
from vlaflow.training.loss_module import LossModule, can_compile
from vlaflow.training.metrics_log import RunLog, Tracker, choose_tracker
from vlaflow.training.moments import Masters, Moments
from vlaflow.training.optim import build_optimizer, freeze, late_parameters, multiplier, set_rate, with_rate
from vlaflow.training.outcome import Outcome
from vlaflow.training.precision import FORMAT, chosen_format
from vlaflow.training.step import SIGNALS, StepNumbers, TakenStep, shares
from vlaflow.training.stopping import Best, kept_settings
from vlaflow.training.team import Team, meet
from vlaflow.versions import versions


class Trainer:
    """Trains one stage.

    Args:
        stage: what is learned.
        config: how.
        train: training samples.
        validation: held-out samples, or None.
        validation_each: held-out samples of each of several data sets, by name and with its weight, in place of ``validation``.
        order: how training goes through the samples.
        vqa: to learn from in turns with the samples, or None.
        out: folder of the checkpoint; an unfinished run in it is continued.
        identity: JSON data that must be the same for a run to be continued (the data set's fingerprint, ...); the config
            is added.
        card: text of the checkpoint's README.md for an outcome.
        tracker: where the log goes besides ``training/log.jsonl``.
        fresh: start over; an old checkpoint in ``out`` is moved aside.
        shard: processes that train together share the weights instead of each holding all (see ``sharding``).
        compiled: compile the loss (see ``LossModule``).
        late: load a step one step ahead and read its loss one step later, so that the host never waits for the device; by
            default where this is no CPU.

    Raises:
        ConfigError: an unknown tracker.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        train: Source,
        validation: Source | None,
        out: Path | str,
        *,
        vqa: CoTraining | None = None,
        validation_each: Mapping[str, tuple[Source, float]] | None = None,
        order: MakeOrder = Order,
        identity: Mapping[str, Any] | None = None,
        card: Callable[[Outcome], str] | None = None,
        tracker: Tracker = "auto",
        fresh: bool = False,
        shard: bool = False,
        compiled: bool = False,
        late: bool | None = None,
    ) -> None:
        self.stage, self.config, self.out, self._card = stage, config, Path(out), card
        self._train, self._order, self._vqa, self._fresh = train, order, vqa, fresh
        self._shard, self._compiled = shard, compiled
        self._validation_sources = {"": (validation, 1.0)} if validation is not None else dict(validation_each or {})
        self._given_identity, self._log_with = {**(identity or {})}, choose_tracker(tracker)
        # Losses of two kinds have two sizes, so each is compared with its own past.
        self._divergence = {name: Divergence(config.optim.warmup_steps) for name in get_args(LossName)}
        self.step, self._seconds, self._saved, self._best = 0, 0.0, -1, Best(config.stop)
        self._validation: float | None = None
        self._reads_late, self._last_read = late, 0.0
        self._owes = False  # the validation of the present step
        self._continued: dict[str, Any] = {}

    def _begin(self) -> None:
        """Put the folder in order, the networks on their device and everything where an unfinished run left it."""
        from accelerate import DistributedDataParallelKwargs

        stage, config = self.stage, self.config
        self.accelerator = meet(
            log_with=self._log_with,
            project_dir=str(self.out / "training"),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=stage.uneven)],
        )
        if str(self.accelerator.distributed_type).endswith("FSDP"):
            raise CapabilityError("Leave FSDP out of Accelerate's config, which shards all layers at once, and give --shard.")
        self.device = self.accelerator.device
        late = self.device.type != "cpu" if self._reads_late is None else self._reads_late
        self._behind = int(late)  # steps that may be under way when the next one begins
        self.team = Team(self.accelerator.process_index, self.accelerator.num_processes, self.device)
        with self.team.together():
            if self.team.is_first and (aside := checkpoint.prepare(self.out, self._fresh)):
                sys.stderr.write(f"The old checkpoint is now {aside}.\n")
        self.format = chosen_format(config.precision, self.device, self.team, run_of(self.out).get(FORMAT))
        compiled = {"compile": True} if self._compiled else {}
        run = {**self._given_identity, FORMAT: self.format, **compiled, "config": kept_settings(to_json(config))}
        self.identity = json.loads(json.dumps(run))

        adapters = adapt(stage.module, config.lora, mix("adapters", config.seed)) if config.lora else []
        freeze(stage.module, config.optim)
        self._frozen = digest(stage.module) if adapters else None
        stage.module.train()
        self._model = self._spread(self.format == "bf16")
        masters = Masters(stage.module)
        optim = with_rate(config.optim, adapters, config.lora.learning_rate if config.lora else None)
        self._optimizer = build_optimizer(stage.module, optim, masters, bf16=self.format == "bf16")
        self._moments = Moments(self._optimizer, masters.of)
        self._late = late_parameters(stage.module, config.optim)
        self._trained = [p for p in stage.module.parameters() if p.requires_grad]
        self._ema = Ema(stage.module, config.ema_decay) if config.ema_decay is not None else None
        if self._ema is not None and masters.of:
            raise ConfigError("Weights in bfloat16 are too coarse for averages. Set ema_decay=none, or train them in float32.")
        self._held = {name: (self._hold(source), weight) for name, (source, weight) in self._validation_sources.items()}
        self._best.require(bool(self._held))
        self._held_vqa = self._hold(self._vqa.held) if self._vqa and self._vqa.held is not None else None
        self._parts = config.parts(self.team.world, self._resume())
        ahead, order = self._behind > 0, self._order
        acting = Loader(self._train, config, self.team, self.device, stage, parts=self._parts, ahead=ahead, order=order)
        self._loader = alternating(acting, self._vqa) if self._vqa else acting
        if self.team.is_first and 0 < self.step < config.steps:
            sys.stderr.write(f"Continuing after step {self.step} of {config.steps}.\n")

    def _spread(self, bf16: bool) -> nn.Module:
        """The stage's loss as a module: sharded if asked for and there are layers to shard, else a copy in every process."""
        compiled = self._compiled and can_compile(self.device, self.team)
        whole = LossModule(self.stage, bf16, self.device, compiled=compiled)
        blocks = blocks_of(self.stage.module) if self._shard and self.team.world > 1 else {}
        self.sharded = bool(blocks)
        empty = any(parameter.is_meta for parameter in whole.parameters())
        if self.sharded:
            if self._compiled:
                raise CapabilityError("A loss that is sharded layer by layer is not compiled. Leave --compile or --shard out.")
            lora = self.config.lora
            if self.config.optim.packages or (lora and lora.quantise):
                raise CapabilityError(
                    "What bitsandbytes keeps cannot be shared by processes. Leave --shard out, or optim.kind and lora.quantise."
                )
        if self.sharded or empty:
            sharding.shard(whole, blocks, self.team, bf16=bf16)
        self.stage.to(self.device)
        return whole if self.sharded else self.accelerator.prepare(whole)

    def run(self) -> Outcome:
        """Train to the end, or until a signal or an error; everything that changes something outside happens here.

        Raises:
            ConfigError: ``out`` holds another run, takes one at this moment or is not the same folder for all processes, or a
                parameter group matches nothing.
            DivergedError: naming the step and its samples, or what is not finite after it; nothing is saved.
            CheckpointError: the disk is full; the last checkpoint is whole.
        """
        self._begin()
        with checkpoint.claimed(self.out) if self.team.is_first else nullcontext():
            return self._run()

    def _run(self) -> Outcome:
        if self.step >= self.config.steps or self._best.over:
            return self._outcome(None)
        c, held = self.config, bool(self._held or self._held_vqa)
        began = time.monotonic() - self._seconds
        waiting: list[TakenStep] = []  # whose numbers are not read yet
        try:
            with RunLog(self.out, self.step, self.accelerator, self._log_with) as log, Interrupt() as noted, self._bar() as bar:
                if self._owes and held:
                    self._catch_up(log)
                while self.step < c.steps and not self._best.over:
                    taken, part = self._one_step(noted)
                    if taken is not None:
                        waiting.append(taken)
                        self.step += 1
                    last, stopped = self.step == c.steps, signal.SIGTERM if taken is None else 0
                    validates = held and not stopped and (last or self.step % c.validate_every == 0)
                    saves = last or self.step % c.checkpoint_every == 0
                    while waiting and (len(waiting) > self._behind or stopped or validates or saves):
                        entry, signalled = self._read(read := waiting.pop(0))
                        stopped = stopped or signalled
                        if validates and not waiting:
                            self._owes = stopped == signal.SIGTERM and not last
                            entry |= {} if self._owes else {"validation": self._validated()}
                        self._seconds = time.monotonic() - began
                        log.write(read.number, {**entry, "seconds": round(self._seconds, 3)})
                        bar.advance(note=self._note(entry))
                    if self.step and (saves or stopped or self._best.due(self.step)):
                        self._save(part, hurried=self.sharded and stopped == signal.SIGTERM and not last)
                    if stopped:
                        break
                return self._outcome(self._agreed(noted.signal))
        finally:
            self._loader.close()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _one_step(self, interrupt: Interrupt) -> tuple[TakenStep | None, StepPart]:
        """Take step number ``self.step``.

        On a GPU nothing here waits for the device, so numbers that are not finite are noticed when they are read, a step later.

        Args:
            interrupt: notes the signals that this process gets.

        Returns:
            The step, and some of its samples. None in place of a step where a SIGTERM came between its parts: then nothing has
            changed, and it is taken again later.
        """
        c, began, noted = self.config, time.monotonic(), interrupt.signal
        parts = self._loader.step(self.step)
        share_of_peak = multiplier(self.step, c.optim, c.steps)
        set_rate(self._optimizer.param_groups, share_of_peak)
        self.stage.module.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        named: dict[str, Tensor] = {}
        for number, (part, share) in enumerate(zip(parts, shares(parts, self.team), strict=True)):
            if number and self._agreed(interrupt.signal) == signal.SIGTERM:
                return None, parts[0]
            more = number + 1 < len(parts)
            with self.accelerator.no_sync(self._model) if more else nullcontext():
                total, terms = self._model(part.ready, part.drawn)
                torch.autograd.backward(total * (share * self.team.world))  # the wrapper averages over processes
            loss = loss + total.detach().float() * share
            for name, term in terms.items():
                named[name] = named.get(name, torch.zeros_like(loss)) + term.float() * share
        for frozen_steps, parameter in self._late:
            if self.step < frozen_steps:
                parameter.grad = None  # so it neither counts in the norm nor begins its moments
        gradient = sharding.whole(nn.utils.clip_grad_norm_(self._trained, c.optim.clip_norm or math.inf))
        stops = moved(torch.tensor([float(noted == each) for each in SIGNALS]), self.device, non_blocking=True)
        sums = self.team.sum(torch.cat([torch.stack([loss, *named.values()]), stops]))
        values = torch.cat([sums, gradient.detach().float().reshape(1)])
        rate = c.optim.learning_rate * share_of_peak
        taken = TakenStep.of(self.step + 1, parts, tuple(named), values, rate=rate, began=began)
        if not self._behind:
            self._require_sound(taken, taken.read())
        self._optimizer.step()
        self.stage.after_step(self.step, Generator().manual_seed(mix("after step", c.seed, self.step)))
        if self._ema is not None:
            self._ema.update()
        return taken, parts[0]

    def _read(self, taken: TakenStep) -> tuple[dict[str, Any], int]:
        """The log entry of a step, and the signal after which the processes are to stop (0 for none).

        Raises:
            DivergedError: its numbers are not sound.
        """
        numbers = taken.read()
        if self._behind:
            self._require_sound(taken, numbers)
        now, began = time.monotonic(), max(taken.began, self._last_read)
        self._last_read = now
        samples = sum(len(part.batch.observation) for part in taken.parts) * self.team.world
        return taken.entry(numbers, samples, now - began), numbers.stopped

    def _require_sound(self, taken: TakenStep, numbers: StepNumbers) -> None:
        past = self._divergence[taken.loss_name]
        if complaint := past.complaint(taken.number - 1, numbers.loss, numbers.gradient):
            batches = [part.batch for part in taken.parts]
            raise diverged(f"{complaint} at step {taken.number} of {self.config.steps}", batches, self.out)

    def _unsound(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} after step {self.step} of {self.config.steps}, so nothing is saved. Lower optim.learning_rate. "
            f"{untouched(self.out)}"
        )

    def _hold(self, source: Source) -> Held:
        return Held(source, self.config.global_batch_size // self.config.accumulate, self.config.seed)

    def _validated(self) -> dict[str, float]:
        """What the validation of the present step found, now that the run has taken it into account."""
        measured = self._validate()
        self._validation = measured.get("loss")
        self._best.update(self.step, measured)
        return measured

    def _catch_up(self, log: RunLog) -> None:
        """Make up for the validation that a SIGTERM left out at the step that the run continues from, with all it decides."""
        log.amend(self.step, {"validation": self._validated()})
        self._owes = False
        state = {**self._continued, "validation": self._validation, "best": self._best.state(), "owes": False}
        checkpoint.complete(self.out, self.step, state, self._policy_of(state["writers"]), team=self.team)

    def _validate(self) -> dict[str, float]:
        """The losses of ``held_out_losses``.

        Raises:
            DivergedError: one of them is not finite.
        """

        def measure(held: Held) -> dict[str, float]:
            return self._measure(held.parts(self.team, self.device, self.stage))

        found = held_out_losses(self._held, self._held_vqa, measure)
        for name in ("loss", "answer"):
            if not math.isfinite(value := found.get(name, 0.0)):
                raise self._unsound(f"The held-out {name} is {value}")
        return found

    @torch.no_grad()
    def _measure(self, parts: Iterable[tuple[StepPart, bool]]) -> dict[str, float]:
        """Losses on samples, of which some count, with the averaged weights."""
        module = self.stage.module
        module.eval()
        sums: dict[str, Tensor] = {}
        with self._ema.in_module() if self._ema is not None else nullcontext():
            for part, counted in parts:
                total, terms = self._model(part.ready, part.drawn)
                weight = part.targets * counted
                for name, term in {"loss": total, **terms, "": torch.ones_like(total)}.items():
                    sums[name] = sums.get(name, torch.zeros_like(term, dtype=torch.float64)) + term * weight
            sharding.reshard(self._model)  # before the weights come back in place of the average
        module.train()
        values = self.team.sum(torch.stack(list(sums.values())))
        count = max(float(values[-1]), 1.0)
        return {name: float(value) / count for name, value in zip(sums, values, strict=True) if name}

    # -- saving and continuing ---------------------------------------------------------------------------------------

    def _save(self, part: StepPart, hurried: bool = False) -> None:
        """Write a checkpoint of weights that are finite and, on samples of the step just taken, give a finite loss.

        A hurried one, for processes that are about to be killed, leaves out that loss and the policy.

        Raises:
            DivergedError: they are or do not.
            CheckpointError: it cannot be written.
        """
        if self._saved == self.step:
            return
        module = self.stage.module
        tensors = checkpoint.collect(module, self._moments, self._ema, frozen=self.sharded or self._frozen is None)
        with self.team.together():
            for kind, group in tensors.items():
                if name := first_not_finite({name: sharding.own_rows(tensor)[0] for name, tensor in group.items()}):
                    raise self._unsound(f"'{name}' ({kind}) holds NaN or an infinite value")
        if not hurried and not math.isfinite(loss := self._measure([(part, True)])["loss"]):  # too large to compute with
            raise self._unsound(f"The loss on the step's own samples is {loss}")
        writers = self.team.world if self.sharded else 1
        state = {
            "step": self.step,
            "seconds": self._seconds,
            "validation": self._validation,
            "best": self._best.state(),
            "owes": self._owes,
            "losses": list(self._divergence["loss"].losses),
            "answer_losses": list(self._divergence["answer_loss"].losses),
            "processes": self.team.world,
            "writers": writers,
            "parts": self._parts,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "moments": len(tensors["optimizer"]),
            "frozen": self._frozen,
            "run": self.identity,
        }
        save_policy = None if hurried else self._policy_of(writers)
        checkpoint.publish(self.out, self.step, state, tensors, save_policy, team=self.team)
        self._saved = self.step

    def _policy_of(self, writers: int) -> Callable[[Path], None] | None:
        """Writes the policy of a training state into a folder of it; None where the policy of an earlier step is kept.

        Args:
            writers: number of processes that wrote the state.
        """
        if self._best.keeps(self.step):
            return None
        card = self._card(self._outcome(None)) if self._card is not None and self.team.is_first else ""

        def save_policy(folder: Path) -> None:
            with checkpoint.policy_weights(folder.parent, writers, self._ema is not None) as weights:
                self.stage.save(folder, weights, card)

        return save_policy

    def _resume(self) -> int:
        """Take everything from the newest checkpoint; returns the parts of its steps, 1 without one."""
        found = newest_state(self.out)
        checkpoint.require_same_step(self.out, found[0] if found else -1, self.team)
        if found is None:
            return 1
        with self.team.together():
            state = checkpoint.read_state(found[1], self.identity)
            checkpoint.restore(found[1], state, self.stage.module, self._moments, self._ema, frozen=self._frozen)
        self.step = self._saved = state["step"]
        self._seconds, self._validation = state["seconds"], state["validation"]
        self._best.restore(state["best"])
        self._owes, self._continued = state.get("owes", False), state
        self._divergence["loss"].losses.extend(state["losses"])
        self._divergence["answer_loss"].losses.extend(state.get("answer_losses", ()))
        return state["parts"]

    def _agreed(self, noted: int | None) -> int | None:
        """The signal that any process noted, in all of them: none may go on to another stage alone."""
        return max(self.team.gather(noted or 0)) or None

    def _outcome(self, signal: int | None) -> Outcome:
        losses = list(self._divergence["loss"].losses)[-100:]
        mean = sum(losses) / len(losses) if losses else None
        return Outcome(self.step, self.config.steps, mean, self._validation, self._seconds, signal, best=self._best.final)

    # -- words -------------------------------------------------------------------------------------------------------

    def _bar(self) -> Any:
        if not self.team.is_first:
            return nullcontext(Silent())
        return progress(self.config.steps, "Training", done=self.step)

    def _note(self, entry: Mapping[str, Any]) -> str:
        held = "" if self._validation is None else f", held out {self._validation:.4f}"
        name = "loss" if "loss" in entry else "answer_loss"
        return f"{name.replace('_', ' ')} {entry[name]:.4f}{held}, {entry['samples_per_second']:.0f} samples/s"
