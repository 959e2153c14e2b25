"""The public face of a trained system: observations in robot units go in, chunks in robot units come out.

>>> policy = Policy.from_pretrained("runs/demo/policy")
>>> chunk = policy.act(observation, compute=Refine())
>>> chunk.actions.shape  # (chunk_size, action dimension)

One class serves every system: what differs is the config (which backbone, which decoder, which rater), never the code.
Checkpoints are folders of JSON and safetensors; nothing in them is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow import __version__
from vlaflow.backbones.base import Prefix
from vlaflow.backbones.inputs import Processor, require_state
from vlaflow.backbones.language import speaking
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.config import from_versioned, to_json
from vlaflow.data.batch import Batch, ObservationBatch, VqaBatch
from vlaflow.data.common import CommonShape, Normalizers
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Normalizer
from vlaflow.decoders.answers import Answer, greedy
from vlaflow.decoders.base import Conditioning, Targets
from vlaflow.decoders.losses import LossTerms
from vlaflow.decoders.model import Model
from vlaflow.decoders.rating import BaseRaterConfig
from vlaflow.engine.deploy import Engine
from vlaflow.errors import CapabilityError
from vlaflow.io import read_json
from vlaflow.nn.precision import Dtype, autocast, is_bf16, round_matrices
from vlaflow.nn.stored import drawing
from vlaflow.outputs import write_json, write_text
from vlaflow.policies.action_prefix import conditioning_of, in_lists
from vlaflow.policies.adapters import save_merged
from vlaflow.policies.checkpoint import home_of, local_folder
from vlaflow.policies.chunks import chunks
from vlaflow.policies.computes import Computes
from vlaflow.policies.engines import with_engine
from vlaflow.policies.policy_config import PolicyConfig
from vlaflow.policies.processor import Drawn, PolicyProcessor, Prepared, PreparedAnswers, require_views
from vlaflow.policies.robots import FOLDER, Robot, chosen_robot, read_robots, write_robots
from vlaflow.spec import ActionPrefix, ActionSpec, Chunk, Observation
from vlaflow.stacks.base import blocks_of

__all__ = ["Policy", "PolicyConfig"]


@dataclass
class Policy:
    """Networks, normalisation and the meaning of the actions.

    Args:
        config: how the networks are built.
        action_spec: what the actions mean, with the chunk size.
        stats: statistics of "state" and "action" of the training data, for normalisation.
        model: the networks.
        card: text of the checkpoint's README.md.
        backbone_processor: makes the backbone's inputs; by default the one that the config opens.
        folder: the checkpoint it was opened from; None for a new one.
        dtype: what the networks compute in when they act; training decides for itself.
        robots: all robots it was trained for, by name, where there are several; ``action_spec`` and ``stats`` are then those of
            the one it acts for.
        robot: name of that one; None for a policy of one robot, and while a policy of several is trained.

    Attributes:
        processor: from observations in robot units to the networks' inputs, on the CPU (see ``PolicyProcessor``).
        action_normalizer: of the robot it acts for.
    """

    config: PolicyConfig
    action_spec: ActionSpec
    stats: Mapping[str, FeatureStats]
    model: Model
    card: str = ""
    backbone_processor: Processor | None = field(default=None, repr=False)
    folder: Path | None = None
    dtype: Dtype = "fp32"
    robots: Mapping[str, Robot] = field(default_factory=dict)
    robot: str | None = None
    processor: PolicyProcessor = field(init=False, repr=False)
    action_normalizer: Normalizer = field(init=False, repr=False)
    _action: Normalizers = field(init=False, repr=False)
    _computes: Computes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        c, widest = self.config, max((r.action_spec.dim for r in self.robots.values()), default=self.action_spec.dim)
        c.require_actions(widest, padded=bool(self.robots))
        own = self.backbone_processor = self.backbone_processor or c.backbone.processor()
        acting = self.robots[self.robot] if self.robot else Robot(self.action_spec, dict(self.stats), ())
        state, action = zip(*(robot.normalizers(c) for robot in self.robots.values() or (acting,)), strict=True)
        self.action_normalizer = acting.normalizers(c)[1]
        side = acting.image_size
        views = {view: size or side for view, size in self.model.backbone.views.items()}
        width = c.backbone.state_dim if self.robots else state[0].dim
        self.processor = PolicyProcessor(views, Normalizers(state, width), own, c.backbone.input_size.area)
        self._action = Normalizers(action, c.decoder.action_dim)
        self._computes = Computes(self.folder)

    @staticmethod
    def create(
        config: PolicyConfig,
        action_spec: ActionSpec,
        stats: Mapping[str, FeatureStats],
        seed: int,
        *,
        folder: Path | None = None,
        robots: Mapping[str, Robot] | None = None,
    ) -> Policy:
        """A new policy with weights drawn from ``seed``; the global generator is left as it was.

        Args:
            config, action_spec, stats: see the class.
            seed: of the weights.
            folder: of a checkpoint whose tokenizer and image settings it takes; by default those of the backbone's source.
            robots: by name, where there are several.
        """
        with torch.random.fork_rng(devices=[]), drawing():
            torch.manual_seed(seed)
            model = config.build()
        config.require_positions(model.decoder.suffix_tokens)
        processor = config.backbone.processor(folder)
        config = replace(config, backbone=model.backbone.config)
        if not robots:
            action_spec = action_spec.with_chunk_size(config.decoder.chunk_size)
        return Policy(config, action_spec, stats, model, backbone_processor=processor, robots=robots or {})

    def with_rater(self, rater: BaseRaterConfig, seed: int) -> Policy:
        """The same policy, sharing its weights, with a new rater drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = rater.build(self.model.backbone.spec, self.config.decoder.action_dim, self.config.decoder.chunk_size)
        model = Model(self.model.backbone, self.model.decoder, network, self.model.depths)
        return replace(self, config=replace(self.config, rater=rater), model=model, folder=None)

    @property
    def default_compute(self) -> ComputePolicy:
        """What ``act`` runs unless the caller says otherwise: ``auto`` where the sampler was calibrated, else ``Dense()``."""
        return self._computes.default(self)

    def compute(self, name: str) -> ComputePolicy:
        """The compute policy that the command line knows by this name, such as "exit:adaptive" (``vlaflow.compute.parse``).

        Raises:
            ConfigError: for an unknown or malformed name.
            CalibrationError: for a calibration or measurement that is missing, or of other weights.
        """
        return self._computes.named(name, self)

    @property
    def chunk_size(self) -> int:
        """Actions per chunk of the robot it acts for; the decoder makes as many as the longest of all robots has."""
        return self.action_spec.chunk_size or self.config.decoder.chunk_size

    @property
    def n_action_steps(self) -> int:
        """Actions executed per chunk unless the caller says otherwise: for every robot the same share of its chunk."""
        return max(1, round(self.config.n_action_steps * self.chunk_size / self.config.decoder.chunk_size))

    @property
    def views(self) -> dict[str, int | None]:
        """Views that an observation must have, with the image size each is resized to (None: any size)."""
        own = self.robots[self.robot].views if self.robot else self.processor.views
        return {view: self.processor.views[view] for view in own}

    @property
    def shape(self) -> CommonShape:
        """What the networks take and make."""
        c = self.config
        return CommonShape(c.backbone.state_dim, c.decoder.action_dim, c.decoder.chunk_size, tuple(self.model.backbone.views))

    def for_robot(self, name: str | None) -> Policy:
        """The same networks acting for one of the robots, by name; the policy itself where there is only one."""
        found = chosen_robot(self.robots, name, str(self.folder or "The policy"))
        if found is None:
            return self
        mine, folder = self.robots[found], self.folder and home_of(self.folder) / FOLDER / found
        return replace(self, action_spec=mine.action_spec, stats=mine.stats, robot=found, folder=folder)

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return self.model.device

    def precision(self) -> AbstractContextManager[object]:
        """The context in which the networks act: all methods for inference enter it, and direct calls of the networks must."""
        return autocast(self.dtype == "bf16", self.device)

    # -- training ----------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """A batch in robot units as ``loss`` takes it, on the CPU: the loader does this ahead of the networks."""
        return Prepared(self.processor(batch.observation), self.targets(batch))

    def prepare_answers(self, batch: VqaBatch) -> PreparedAnswers:
        """A batch of questions as ``answer_loss`` takes it, on the CPU; refused where the backbone cannot answer."""
        speaking(self.model.backbone)
        return PreparedAnswers(self.processor(batch.observation), self.processor.backbone.answer_ids(batch.answers))

    def targets(self, batch: Batch) -> Targets:
        """Normalised actions of a training batch."""

        def normalised(action_BLD: Tensor) -> Tensor:
            return self._action.forward(action_BLD, batch.observation.robot_B)

        executed = batch.executed and replace(batch.executed, action_BLD=normalised(batch.executed.action_BLD))
        action_BLD = normalised(batch.action_BLD)
        return self.model.decoder.prepare(Targets(action_BLD, batch.valid_BL, batch.code_BK, executed, batch.mask_BLD))

    def own(self, observation: ObservationBatch) -> ObservationBatch:
        """Observations of the robot that it acts for as the networks know them, where there are several robots.

        Raises:
            ConfigError: no robot was chosen.
            SpecError: a view or a number of the state is missing.
        """
        if not self.robots:
            return observation
        name = chosen_robot(self.robots, self.robot, str(self.folder or "The policy"))
        views = self.robots[str(name)].views
        require_views(observation, views)
        require_state(observation, self.stats["state"].dim)
        return self.shape.observation(observation, list(self.robots).index(str(name)), views)

    def own_batch(self, batch: Batch) -> Batch:
        """Training samples of the robot that it acts for as the networks know them, where there are several robots."""
        return self.shape.batch(batch, list(self.robots).index(self.robot)) if self.robot else batch

    def begin(self, batch: Prepared) -> Prefix:
        """The tokens of what ``prepare`` made of a batch, before the first layer."""
        return replace(self.model.backbone.embed(batch.inputs), action_mask_BLD=batch.targets.mask_BLD)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """The tokens of raw observations, before the first layer."""
        with self.precision():
            prefix = self.model.embed(self.processor(observation).to(self.device, non_blocking=True))
        if observation.robot_B is None:
            return prefix
        masks = torch.stack([self.shape.mask(r.action_spec.chunk_size or 0, r.action_spec.dim) for r in self.robots.values()])
        return replace(prefix, action_mask_BLD=masks[observation.robot_B].to(self.device))

    def encode(self, observation: ObservationBatch, depth: int | None = None) -> Prefix:
        """The prefix of raw observations, through so many layers (all by default)."""
        with self.precision():
            return self.model.read(self.embed(observation), depth)

    def draw(self, batch: Prepared, generator: Generator, shared: Generator) -> Drawn:
        """Everything random in ``loss_of``, on the CPU, ahead of the networks as ``prepare`` is; ``shared`` chooses exits."""
        depth = self.config.exits.draw(shared) if self.config.exits else ()
        return Drawn(self.model.decoder.draw(len(batch.inputs), generator), depth)

    def loss(self, batch: Prepared, generator: Generator, shared: Generator) -> LossTerms:
        """``loss_of`` with what is drawn from these generators."""
        return self.loss_of(batch, self.draw(batch, generator, shared).to(self.device))

    def loss_of(self, batch: Prepared, drawn: Drawn) -> LossTerms:
        """Training loss of backbone and decoder on what ``prepare`` and ``draw`` made, on the networks' device.

        With exits it is their (weighted) mean, or that of the one drawn; in evaluation mode it is that of the full depth, and
        the parts name the other exits' losses.
        """
        model, exits, embedded = self.model, self.config.exits, self.begin(batch)
        if drawn.integers and model.training:
            return model.decoder.loss_of(model.read(embedded, drawn.integers[0]), batch.targets, drawn.numbers)
        terms = model.decoder.loss_of(model.read(embedded), batch.targets, drawn.numbers, exits.depths if exits else None)
        if exits is None:
            return terms
        return exits.total(terms) if model.training else terms.answering(terms.exits[exits.depths[-1]])

    def answer_loss(self, batch: PreparedAnswers) -> Tensor:
        """Language-model loss on what ``prepare_answers`` made of questions; decoder and rater have no part in it."""
        backbone = speaking(self.model.backbone)
        return backbone.answer_loss(backbone.embed(batch.inputs), batch.answer_BT)

    # -- inference ---------------------------------------------------------------------------------------------------

    @overload
    def act(
        self,
        observation: Observation,
        compute: ComputePolicy | str | None = None,
        *,
        generator: Generator | None = None,
        action_prefix: ActionPrefix | None = None,
        guided: bool = False,
    ) -> Chunk: ...

    @overload
    def act(
        self,
        observation: Sequence[Observation],
        compute: ComputePolicy | str | None = None,
        *,
        generator: Sequence[Generator] | None = None,
        action_prefix: Sequence[ActionPrefix | None] | None = None,
        guided: bool = False,
    ) -> list[Chunk]: ...

    def act(
        self,
        observation: Observation | Sequence[Observation],
        compute: ComputePolicy | str | None = None,
        *,
        generator: Generator | Sequence[Generator] | None = None,
        action_prefix: ActionPrefix | Sequence[ActionPrefix | None] | None = None,
        guided: bool = False,
    ) -> Chunk | list[Chunk]:
        """Decide what to do next.

        Args:
            observation: one observation, or several of the same robot, in robot units.
            compute: how much compute to spend, or its name (see ``compute``); ``default_compute`` by default.
            generator: one per observation; by default each is seeded with 0, so the same observation gives the same chunk.
            action_prefix: what of the chunk before each new one continues; None for a fresh start.
            guided: continue by guidance even where training gave the decoder committed actions.

        Returns:
            One chunk, or one per observation, in robot units, clipped to the action spec's range but for what is committed.

        Raises:
            SpecError: for missing views, states of another length, or an action prefix out of range or as long as the chunk.
            ConfigError, CalibrationError: for a name that ``compute`` refuses.
            CapabilityError: when the compute policy needs something the checkpoint lacks, or its decoder can continue no chunk.
            NotFiniteError: when the networks compute NaN or an infinite value.
        """
        observations, generators, action_prefixes = in_lists(observation, generator, action_prefix)
        conditioning = conditioning_of(self, action_prefixes, guided=guided)
        chosen = self.compute(compute) if isinstance(compute, str) else compute or self.default_compute
        # Guidance needs gradients, which tensors of the inference mode can never have.
        with torch.no_grad() if conditioning and conditioning.guidance else torch.inference_mode(), self.precision():
            made = self._decode(observations, chosen, generators, conditioning)
        for chunk, known in zip(made, action_prefixes, strict=True):
            if known is not None:
                chunk.actions[: known.count] = known.actions[: known.count]
        return made[0] if isinstance(observation, Observation) else made

    def _decode(
        self,
        observations: list[Observation],
        compute: ComputePolicy,
        generators: list[Generator],
        conditioning: Conditioning | None,
    ) -> list[Chunk]:
        compute.needs.check(self.model, compute.name, self.folder)
        watch = Stopwatch(self.device)
        with watch.part("total"):
            with watch.part("prefix"):
                prefix = self.embed(self.own(ObservationBatch.collate(observations)))
            out = compute.executing(self.n_action_steps).decode(self.model, prefix, generators, watch, conditioning)
            action_BLD = self.to_robot(out.action_BLD)
        draft_BLD = None if out.draft_BLD is None else self.to_robot(out.draft_BLD)
        return chunks(out, action_BLD, draft_BLD, self.action_spec, [watch.milliseconds] * len(observations))

    def answer(self, observations: Sequence[Observation], limit: int = 32) -> list[Answer]:
        """Answer the questions that the observations' instructions are; their states are not looked at.

        Args:
            observations: images and questions.
            limit: most tokens of an answer, its end included.

        Raises:
            SpecError: for missing views or states of another length.
            CapabilityError: when the backbone has no language-model head.
        """
        batch = self.own(ObservationBatch.collate(observations))
        return self.reply(replace(batch, known_BS=torch.zeros_like(batch.state_BS, dtype=torch.bool)), limit)

    @torch.inference_mode()
    def reply(self, observation: ObservationBatch, limit: int = 32) -> list[Answer]:
        """``answer`` for a batch as data sets give it."""
        speaking(self.model.backbone)
        words = self.processor.backbone
        with self.precision():
            made = greedy(self.embed(observation), words.end_id, limit)
        return [Answer(*pair) for pair in zip(words.answer_texts(made.id_BT), made.ended_B.tolist(), strict=True)]

    def to_robot(self, action_BLD: Tensor) -> np.ndarray:
        """Normalised actions (B, L, D) in robot units, not clipped: the dimensions and steps that the robot has."""
        return self.action_normalizer.inverse(self.cut(action_BLD).float()).cpu().numpy()

    def cut(self, action_BLD: Tensor) -> Tensor:
        """Chunks (..., L, D) of the networks without the dimensions and steps that the robot lacks."""
        return action_BLD[..., : self.chunk_size, : self.action_spec.dim]

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write ``config.json``, ``model.safetensors``, ``README.md``, and ``action_spec.json`` and ``stats.json``.

        A policy of several robots has ``robots.json`` and a folder for each in place of the last two.

        Args:
            folder: where to.
            weights: tensors to save in place of the model's own of the same names, e.g. averaged ones. Adapters are merged.

        Raises:
            CapabilityError: it was opened in bfloat16, so its weights are no longer those of the checkpoint.
        """
        if self.dtype != "fp32":
            raise CapabilityError(f"A policy opened in {self.dtype} holds rounded weights. Open it in fp32 to save it.")
        folder = Path(folder)
        write_json(folder / "config.json", {"vlaflow": __version__, **to_json(self.config)})
        write_robots(folder, self.action_spec, self.stats, self.robots)
        write_text(folder / "README.md", self.card or f"# {self.config.system} policy, vlaflow {__version__}\n")
        save_merged(folder / "model.safetensors", self.model, weights)
        self.processor.backbone.save(folder)

    @staticmethod
    def from_pretrained(
        path: Path | str, device: str = "cpu", dtype: Dtype = "fp32", robot: str | None = None, engine: Engine = "eager"
    ) -> Policy:
        """Open a checkpoint folder (or, where it is no folder, a Hugging Face repository id).

        Args:
            path: of the checkpoint, or of one of its robots' folders (``robots``).
            device: where the networks run.
            dtype: what they compute in; "bf16" halves the memory of their layers (docs/performance.md).
            robot: which one to act for, where it was trained for several.
            engine: what computes it (``engines.with_engine``).

        Raises:
            CheckpointError: for missing or damaged files, or weights that do not fit the config.
            ConfigError: several robots and no choice, or none of this name; an unknown dtype or engine.
        """
        home = home_of(folder := local_folder(path))
        opened = Policy.of_all_robots(home, device, dtype).for_robot(folder.name if robot is None and home != folder else robot)
        return with_engine(opened, engine)

    @staticmethod
    def of_all_robots(path: Path | str, device: str = "cpu", dtype: Dtype = "fp32") -> Policy:
        """Open a checkpoint without choosing one of its robots, for further training; otherwise as ``from_pretrained``."""
        folder = local_folder(path)
        config = from_versioned(PolicyConfig, read_json(folder / "config.json"), str(folder / "config.json"))
        action_spec, stats, robots = read_robots(folder, config)
        model = config.opened(folder / "model.safetensors", device)
        if is_bf16(dtype):
            round_matrices(blocks_of(model))
        card, processor = folder / "README.md", config.backbone.processor(folder)
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        return Policy(config, action_spec, stats, model.eval(), text, processor, folder, dtype, robots)
