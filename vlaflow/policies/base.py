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
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow import __version__
from vlaflow.backbones.base import BackboneConfig, Prefix
from vlaflow.backbones.inputs import Processor
from vlaflow.backbones.language import speaking
from vlaflow.compute.auto import calibrated
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.spelling import Knobs
from vlaflow.config import from_json, to_json
from vlaflow.data.batch import Batch, ObservationBatch, VqaBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Mode, Normalizer
from vlaflow.decoders.answers import Answer, greedy
from vlaflow.decoders.base import Conditioning, DecoderConfig, LossTerms, Targets
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.model import Model
from vlaflow.decoders.rater import RaterConfig
from vlaflow.engine.deploy import Engine, deployed
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.io import load_weights, read_json, save_tensors, write_json
from vlaflow.nn.precision import Dtype, autocast, round_matrices
from vlaflow.policies.action_prefix import conditioning_of
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.outcome import require_finite, token_report
from vlaflow.policies.processor import PolicyProcessor, Prepared, PreparedAnswers
from vlaflow.policies.provenance import fingerprint
from vlaflow.spec import ActionPrefix, ActionSpec, Chunk, Observation
from vlaflow.stacks.base import blocks_of


@dataclass(frozen=True)
class PolicyConfig:
    """All that is needed to build a policy's networks.

    Args:
        system: the system this assembly follows, e.g. "asyncvla".
        backbone, decoder, rater: configs of the parts, vlaflow's or another package's; no rater until one is trained.
        state_normalisation, action_normalisation: modes of the normalisers.
        exits: depths at which the decoder also learns to answer; None for the full depth alone.
        n_action_steps: actions executed per chunk unless the caller says otherwise.
    """

    system: str
    backbone: BackboneConfig
    decoder: DecoderConfig
    rater: RaterConfig | None = None
    exits: ExitTraining | None = None
    state_normalisation: Mode = "mean_std"
    action_normalisation: Mode = "mean_std"
    n_action_steps: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.n_action_steps <= self.decoder.chunk_size:
            raise ConfigError(
                f"n_action_steps must lie in 1..{self.decoder.chunk_size} (the chunk size), got {self.n_action_steps}."
            )

    def build(self) -> Model:
        """The networks, initialised from torch's global generator; use ``Policy.create`` for a seeded policy."""
        backbone = self.backbone.build()
        depth = backbone.spec.depth
        if self.exits is not None and self.exits.depths[-1] != depth:
            raise ConfigError(
                f"The last of the exits {list(self.exits.depths)} must be the backbone's depth, {depth}. Change exits.depths "
                "with it, or set exits=none."
            )
        decoder = self.decoder.build(backbone.spec)
        rater = self.rater.build(self.decoder.action_dim, self.decoder.chunk_size) if self.rater else None
        return Model(backbone, decoder, rater, self.exits.depths if self.exits else ())


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

    Attributes:
        processor: from observations in robot units to the networks' inputs, on the CPU (see ``PolicyProcessor``).
    """

    config: PolicyConfig
    action_spec: ActionSpec
    stats: Mapping[str, FeatureStats]
    model: Model
    card: str = ""
    backbone_processor: Processor | None = field(default=None, repr=False)
    folder: Path | None = None
    dtype: Dtype = "fp32"
    processor: PolicyProcessor = field(init=False, repr=False)
    _action: Normalizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.action_spec.dim != self.config.decoder.action_dim:
            raise SpecError(
                f"The decoder makes {self.config.decoder.action_dim} action dimensions, the action spec names "
                f"{self.action_spec.dim}. Set decoder.action_dim to the data set's."
            )
        own = self.backbone_processor = self.backbone_processor or self.config.backbone.processor()
        state = Normalizer.from_stats(self.stats["state"], self.config.state_normalisation)
        self.processor = PolicyProcessor(self.model.backbone.views, state, own)
        self._action = Normalizer.from_stats(self.stats["action"], self.config.action_normalisation)

    @staticmethod
    def create(
        config: PolicyConfig,
        action_spec: ActionSpec,
        stats: Mapping[str, FeatureStats],
        seed: int,
        *,
        folder: Path | None = None,
    ) -> Policy:
        """A new policy with weights drawn from ``seed``; the global generator is left as it was.

        Args:
            config, action_spec, stats: see the class.
            seed: of the weights.
            folder: of a checkpoint whose tokenizer and image settings it takes; by default those of the backbone's source.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = config.build()
        processor = config.backbone.processor(folder)
        config = replace(config, backbone=model.backbone.config)
        return Policy(
            config, action_spec.with_chunk_size(config.decoder.chunk_size), stats, model, backbone_processor=processor
        )

    def with_rater(self, rater: RaterConfig, seed: int) -> Policy:
        """The same policy, sharing its weights, with a new rater drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = rater.build(self.config.decoder.action_dim, self.config.decoder.chunk_size)
        model = Model(self.model.backbone, self.model.decoder, network, self.model.depths)
        return replace(self, config=replace(self.config, rater=rater), model=model, folder=None)

    @cached_property
    def default_compute(self) -> ComputePolicy:
        """What ``act`` runs unless the caller says otherwise: ``auto`` where the sampler was calibrated, else ``Dense()``.

        Raises:
            CalibrationError: for a calibration of other weights.
        """
        knobs = Knobs(dtype=self.dtype)
        return (None if self.folder is None else calibrated(self.folder, fingerprint, knobs)) or Dense()

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return next(self.model.parameters()).device

    def precision(self) -> AbstractContextManager[object]:
        """The context in which the networks act: all methods for inference enter it, and direct calls of the networks must."""
        return autocast(self.dtype == "bf16", self.device)

    # -- training ----------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Prepared:
        """A batch in robot units as ``loss`` takes it, on the CPU: the loader does this ahead of the networks."""
        return Prepared(self.processor(batch.observation), self.targets(batch))

    def prepare_answers(self, batch: VqaBatch) -> PreparedAnswers:
        """A batch of questions as ``answer_loss`` takes it, on the CPU.

        Raises:
            CapabilityError: when the backbone has no language-model head.
        """
        speaking(self.model.backbone)
        return PreparedAnswers(self.processor(batch.observation), self.processor.backbone.answer_ids(batch.answers))

    def targets(self, batch: Batch) -> Targets:
        """Normalised actions of a training batch."""
        executed = batch.executed and replace(batch.executed, action_BLD=self._action.forward(batch.executed.action_BLD))
        return Targets(self._action.forward(batch.action_BLD), batch.valid_BL, batch.code_BK, executed)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """The tokens of raw observations, before the first layer."""
        with self.precision():
            return self.model.embed(self.processor(observation).to(self.device))

    def encode(self, observation: ObservationBatch, depth: int | None = None) -> Prefix:
        """The prefix of raw observations, through so many layers (all by default)."""
        with self.precision():
            return self.model.read(self.embed(observation), depth)

    def loss(self, batch: Prepared, generator: Generator, shared: Generator) -> LossTerms:
        """Training loss of backbone and decoder on what ``prepare`` made of a batch, on the networks' device.

        With exits it is their (weighted) mean, or that of the one drawn from ``shared``; in evaluation mode it is that of the
        full depth, and the parts name the other exits' losses.
        """
        model, exits = self.model, self.config.exits
        embedded = model.backbone.embed(batch.inputs)
        if exits is not None and exits.choose == "random" and model.training:
            depth = exits.depths[int(torch.randint(len(exits.depths), (), generator=shared))]
            return model.decoder.loss(model.read(embedded, depth), batch.targets, generator)
        terms = model.decoder.loss(model.read(embedded), batch.targets, generator, exits.depths if exits else None)
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
        compute: ComputePolicy | None = None,
        *,
        generator: Generator | None = None,
        action_prefix: ActionPrefix | None = None,
        guided: bool = False,
    ) -> Chunk: ...

    @overload
    def act(
        self,
        observation: Sequence[Observation],
        compute: ComputePolicy | None = None,
        *,
        generator: Sequence[Generator] | None = None,
        action_prefix: Sequence[ActionPrefix | None] | None = None,
        guided: bool = False,
    ) -> list[Chunk]: ...

    def act(
        self,
        observation: Observation | Sequence[Observation],
        compute: ComputePolicy | None = None,
        *,
        generator: Generator | Sequence[Generator] | None = None,
        action_prefix: ActionPrefix | Sequence[ActionPrefix | None] | None = None,
        guided: bool = False,
    ) -> Chunk | list[Chunk]:
        """Decide what to do next.

        Args:
            observation: one observation, or several of the same robot, in robot units.
            compute: how much compute to spend; ``default_compute`` by default.
            generator: one per observation; by default each is seeded with 0, so the same observation gives the same chunk.
            action_prefix: what of the chunk before each new one continues; None for a fresh start.
            guided: continue by guidance even where training gave the decoder committed actions.

        Returns:
            One chunk, or one per observation, in robot units, clipped to the action spec's range.

        Raises:
            SpecError: for missing views, states of another length, or committed actions that leave none to make.
            CapabilityError: when the compute policy needs something the checkpoint lacks, or its decoder can continue no chunk.
            NotFiniteError: when the networks compute NaN or an infinite value.
        """
        single = isinstance(observation, Observation)
        observations = [observation] if isinstance(observation, Observation) else list(observation)
        if generator is None:
            generators = [Generator().manual_seed(0) for _ in observations]
        else:
            generators = [generator] if isinstance(generator, Generator) else list(generator)
        if len(generators) != len(observations):
            raise ConfigError(f"{len(observations)} observations need as many generators, got {len(generators)}.")
        action_prefixes = (
            [action_prefix] if isinstance(action_prefix, ActionPrefix) or action_prefix is None else list(action_prefix)
        )
        if action_prefix is None:
            action_prefixes *= len(observations)
        if len(action_prefixes) != len(observations):
            raise ConfigError(f"{len(observations)} observations need as many action prefixes, got {len(action_prefixes)}.")
        conditioning = conditioning_of(action_prefixes, self.model.decoder, self._action, device=self.device, guided=guided)
        # Guidance needs gradients, which tensors of the inference mode can never have.
        guidance = conditioning is not None and conditioning.guidance is not None
        with torch.no_grad() if guidance else torch.inference_mode(), self.precision():
            chunks = self._decode(observations, compute or self.default_compute, generators, conditioning)
        for chunk, known in zip(chunks, action_prefixes, strict=True):
            if known is not None:
                chunk.actions[: known.count] = known.actions[: known.count]
        return chunks[0] if single else chunks

    def _decode(
        self,
        observations: list[Observation],
        compute: ComputePolicy,
        generators: list[Generator],
        conditioning: Conditioning | None,
    ) -> list[Chunk]:
        compute.needs.check(self.model, compute.name)
        watch = Stopwatch(self.device)
        with watch.part("total"):
            with watch.part("prefix"):
                prefix = self.embed(ObservationBatch.collate(observations))
            out = compute.decode(self.model, prefix, generators, watch, conditioning)
            action_BLD = self.to_robot(out.action_BLD)
        require_finite(action_BLD, out)  # before the range is clipped, which would make a bound of an infinite value
        low, high = self.action_spec.low, self.action_spec.high
        draft_BLD = None if out.draft_BLD is None else self.to_robot(out.draft_BLD).clip(low, high)
        return [
            Chunk(
                actions=action_BLD[i].clip(low, high),
                confidence=None if out.confidence_BL is None else out.confidence_BL[i].float().cpu().numpy(),
                spread=None if out.spread_BL is None else out.spread_BL[i].float().cpu().numpy(),
                regenerated=None if out.regenerated_BL is None else out.regenerated_BL[i].cpu().numpy(),
                draft=None if draft_BLD is None else draft_BLD[i],
                layers=out.layers[i],
                layer_passes=out.layer_passes[i],
                nfe=out.nfe[i],
                milliseconds=dict(watch.milliseconds),
                **token_report(out.tokens, i),
            )
            for i in range(len(observations))
        ]

    def answer(self, observations: Sequence[Observation], limit: int = 32) -> list[Answer]:
        """Answer the questions that the observations' instructions are; their states are not looked at.

        Args:
            observations: images and questions.
            limit: most tokens of an answer, its end included.

        Raises:
            SpecError: for missing views or states of another length.
            CapabilityError: when the backbone has no language-model head.
        """
        batch = ObservationBatch.collate(observations)
        return self.reply(replace(batch, known_BS=torch.zeros_like(batch.state_BS, dtype=torch.bool)), limit)

    @torch.inference_mode()
    def reply(self, observation: ObservationBatch, limit: int = 32) -> list[Answer]:
        """``answer`` for a batch as data sets give it."""
        speaking(self.model.backbone)
        words = self.processor.backbone
        with self.precision():
            made = greedy(self.embed(observation), words.end_id, limit)
        pairs = zip(words.answer_texts(made.id_BT), made.ended_B.tolist(), strict=True)
        return [Answer(text, ended) for text, ended in pairs]

    def to_robot(self, action_BLD: Tensor) -> np.ndarray:
        """Normalised actions in robot units, not clipped."""
        return self._action.inverse(action_BLD.float()).cpu().numpy()

    def with_engine(self, engine: Engine) -> Policy:
        """The policy, computed by programs that ``vlaflow deploy`` built of its checkpoint on this machine.

        Args:
            engine: "eager" for no programs; "aoti" or "openvino" for those of this compiler; "auto" for the fastest there is.

        Raises:
            DeploymentError: they were not built, or for something else; not for "auto", which warns and stays eager.
        """
        if engine == "eager" or self.folder is None or (engine == "auto" and self.dtype != "fp32"):
            return self
        if self.dtype != "fp32":
            raise CapabilityError("Programs have a precision of their own (vlaflow deploy --precision); leave --dtype out.")
        found = deployed(self.model, partial(fingerprint, self.folder), engine)
        if found is None:
            return self
        return replace(self, model=found.model, backbone_processor=self.processor.backbone.bucketed(found.lengths))

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write ``config.json``, ``model.safetensors``, ``action_spec.json``, ``stats.json`` and ``README.md``.

        Args:
            folder: where to.
            weights: tensors to save in place of the model's own of the same names, e.g. averaged ones.

        Raises:
            CapabilityError: it was opened in bfloat16, so its weights are no longer those of the checkpoint.
        """
        if self.dtype != "fp32":
            raise CapabilityError(f"A policy opened in {self.dtype} holds rounded weights. Open it in fp32 to save it.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"vlaflow": __version__, **to_json(self.config)})
        write_json(folder / "action_spec.json", to_json(self.action_spec))
        write_json(folder / "stats.json", {name: to_json(s) for name, s in self.stats.items()})
        (folder / "README.md").write_text(self.card or f"# {self.config.system} policy, vlaflow {__version__}\n")
        save_tensors(folder / "model.safetensors", weights or {}, like=self.model.state_dict())
        self.processor.backbone.save(folder)

    @staticmethod
    def from_pretrained(path: Path | str, device: str = "cpu", dtype: Dtype = "fp32", engine: Engine = "eager") -> Policy:
        """Open a checkpoint folder (or, where it is no folder, a Hugging Face repository id).

        Args:
            path: of the checkpoint.
            device: where the networks run.
            dtype: what they compute in; "bf16" halves the memory of their layers (docs/performance.md).
            engine: what computes them; see ``with_engine``.

        Raises:
            CheckpointError: for missing or damaged files, or weights that do not fit the config.
            DeploymentError: see ``with_engine``.
        """
        folder = local_folder(path)
        config_data = read_json(folder / "config.json")
        config_data.pop("vlaflow", None)
        config = from_json(PolicyConfig, config_data, str(folder / "config.json"))
        action_spec = from_json(ActionSpec, read_json(folder / "action_spec.json"), str(folder / "action_spec.json"))
        stats_file = folder / "stats.json"
        stats = {k: from_json(FeatureStats, v, str(stats_file)) for k, v in read_json(stats_file).items()}
        for name, measured in stats.items():
            measured.require_sound(f"'{name}' in {stats_file}")
        with torch.random.fork_rng(devices=[]):
            model = config.build()
        load_weights(model, folder / "model.safetensors")
        if dtype == "bf16":
            round_matrices(blocks_of(model))
        card, processor = folder / "README.md", config.backbone.processor(folder)
        text = card.read_text() if card.exists() else ""
        policy = Policy(config, action_spec, stats, model.to(device).eval(), text, processor, folder, dtype)
        return policy.with_engine(engine)
