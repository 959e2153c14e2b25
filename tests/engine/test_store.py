"""Where programs are kept and when they are refused. A stand-in compiler keeps each program in memory; its file names it."""

import os
import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.backbones.inputs import Processor
from vlaflow.cli.deploy import main
from vlaflow.compute.budget import LADDER, Ladder, Profile, Rung, profile_file, save
from vlaflow.compute.calibration import FOLDER
from vlaflow.compute.cost import ChunkWork, CostModel, Work
from vlaflow.compute.dense import Dense
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.engine import aoti, plan, store
from vlaflow.engine.deploy import DeploymentPlan
from vlaflow.errors import CalibrationError, CapabilityError, DeploymentError
from vlaflow.policies import deployment
from vlaflow.policies.base import Policy
from vlaflow.policies.deployment import build, default_lengths
from vlaflow.policies.engines import for_budgets, timed, with_engine
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.robots import Robot
from vlaflow.spec import Observation
from vlaflow.versions import processor

SEEN = helpers.observation()
PLAN = DeploymentPlan("aoti", "f32", (Dense(2),), (1,), (16,))


def call(module, tensors):
    return module(*tensors)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Programs by their file's bytes; building needs this, opening and acting must not."""
    kept = {}

    def compile_to(program, file, precision):
        kept[str(program.key).encode()] = program.module
        file.write_bytes(str(program.key).encode())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(aoti, "require_compiler", lambda: None)
    monkeypatch.setattr(aoti, "build", compile_to)
    monkeypatch.setattr(aoti, "load", lambda file: partial(call, kept[file.read_bytes()]))
    monkeypatch.setattr(deployment, "ROUNDS", 1)
    return kept


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "policy"
    helpers.policy().save_pretrained(folder)
    return folder


@pytest.fixture
def deployed(compiler, checkpoint, monkeypatch):
    """A checkpoint with programs; from here on a compiler that is called is an error."""
    build(Policy.from_pretrained(checkpoint), checkpoint, PLAN, say=lambda program: None)
    monkeypatch.setattr(aoti, "build", lambda *args, **settings: pytest.fail("something was compiled"))
    return checkpoint


def programs(checkpoint):
    return store.folder(fingerprint(checkpoint), "aoti")


def test_a_deployed_checkpoint_gives_the_same_chunk_from_programs(deployed):
    eager, policy = Policy.from_pretrained(deployed), Policy.from_pretrained(deployed, engine="aoti")
    np.testing.assert_allclose(policy.act(SEEN, Dense(2)).actions, eager.act(SEEN, Dense(2)).actions, atol=1e-5)
    assert (eager.model.engine, policy.model.engine) == ("eager", "aoti f32")
    assert not policy.model.programs.missed


def test_nothing_is_compiled_outside_deploy(deployed):
    """Not even for what has no program: a longer instruction, two observations."""
    policy = Policy.from_pretrained(deployed, engine="aoti")
    policy.act([SEEN, helpers.observation(1, "x" * 30)], Dense(3))
    assert policy.model.programs.missed


def test_programs_are_not_in_the_checkpoint(deployed):
    before = Policy.from_pretrained(deployed)
    copied = deployed.parent / "copied"
    shutil.copytree(deployed, copied)
    assert {file.suffix for file in deployed.rglob("*") if file.is_file()} == {".json", ".safetensors", ".md"}
    assert Policy.from_pretrained(copied, engine="aoti").model.engine == "aoti f32"  # the same weights, here
    assert before.model.engine == "eager"


def test_a_program_that_a_checkpoint_brings_is_not_opened(deployed):
    """Whatever lies in the folder: only this user's cache is looked at."""
    shutil.copytree(programs(deployed), deployed / "programs")
    shutil.rmtree(programs(deployed))
    with pytest.raises(DeploymentError, match=f"vlaflow deploy {deployed} --engine aoti"):
        Policy.from_pretrained(deployed, engine="aoti")


@pytest.mark.parametrize("name", ["torch", "instructions", "machine", "sources"])
def test_programs_of_something_else_are_refused(deployed, monkeypatch, capsys, name):
    """By name with an error that says what differs; auto says it too, and stays eager."""
    patched = {
        "torch": (torch, "__version__", "99.0.0"),
        "instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "none"),
        "machine": (store, "processor", lambda: "an abacus"),
        "sources": (store, "_sources", lambda: "older"),
    }
    monkeypatch.setattr(*patched[name])
    with pytest.raises(DeploymentError, match=rf"built for {name}.*vlaflow deploy {deployed} --engine aoti"):
        Policy.from_pretrained(deployed, engine="aoti")
    assert Policy.from_pretrained(deployed, engine="auto").model.engine == "eager"
    said = capsys.readouterr().err
    assert f"built for {name}" in said
    assert f"vlaflow deploy {deployed} --engine aoti" in said


def test_steps_that_the_engine_does_not_know_stay_eager(compiler, checkpoint, monkeypatch, capsys):
    """As those of another package's decoder: what it reads is computed by programs all the same."""
    monkeypatch.setattr(plan, "steps", lambda decoder, backbone, prefix: [])
    policy = Policy.from_pretrained(checkpoint)
    made = build(policy, checkpoint, PLAN, say=lambda program: None)
    assert {name.split("-")[0] for name in made.programs} == {"embed", "run"}
    assert "no programs for the steps of a FlowDecoder" in capsys.readouterr().err
    chunk = Policy.from_pretrained(checkpoint, engine="aoti").act(SEEN, Dense(2))
    np.testing.assert_allclose(chunk.actions, policy.act(SEEN, Dense(2)).actions, atol=1e-5)


def test_other_weights_have_no_programs(deployed):
    helpers.policy(seed=1).save_pretrained(deployed)
    with pytest.raises(DeploymentError, match="has no programs of aoti on this machine"):
        Policy.from_pretrained(deployed, engine="aoti")
    assert Policy.from_pretrained(deployed, engine="auto").model.engine == "eager"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_what_others_can_write_is_refused(deployed):
    place = programs(deployed)
    for part in (store.root(), place, next(place.glob("step-*"))):
        mode = part.stat().st_mode
        part.chmod(mode | 0o020)
        with pytest.raises(DeploymentError, match="can be written by others"):
            Policy.from_pretrained(deployed, engine="aoti")
        part.chmod(mode)
    outside = deployed.parent / "elsewhere"
    place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(DeploymentError, match=f"is a link.* vlaflow deploy {deployed}"):
        Policy.from_pretrained(deployed, engine="aoti")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_programs_are_private_where_a_users_files_belong_to_a_group(compiler, checkpoint):
    """Many systems give every user a group and let it write: what deploy wrote must not be refused as anybody's."""
    before = os.umask(0o002)
    try:
        build(Policy.from_pretrained(checkpoint), checkpoint, PLAN, say=lambda program: None)
    finally:
        os.umask(before)
    assert Policy.from_pretrained(checkpoint, engine="aoti").model.engine == "aoti f32"


STATES, VIEWS = {"small": 3, "wide": 4}, {"small": ("image",), "wide": ("image", "wrist")}


@pytest.mark.parametrize(
    ("decoder", "names"),
    [
        (FlowConfig(4, 6), ("dense:2", "dense:2,heun")),
        (FlowConfig(4, 6, padded_dim=8), ("dense:2",)),
        (RegressionConfig(4, 6), ("dense",)),
    ],
)
def test_every_robot_of_a_checkpoint_can_be_deployed(compiler, tmp_path, decoder, names):
    """Also one with a shorter state, chunk and action, and fewer views, than others: all of its steps are programs."""
    config = helpers.policy_config()
    config = replace(config, backbone=replace(config.backbone, views=("image", "wrist")), decoder=decoder)
    robots = {
        name: Robot(
            helpers.action_spec(dim).with_chunk_size(2 + dim),
            {"state": helpers.feature_stats(dim), "action": helpers.feature_stats(dim)},
            VIEWS[name],
        )
        for name, dim in STATES.items()
    }
    first = robots["small"]
    Policy.create(config, first.action_spec, first.stats, 0, robots=robots).save_pretrained(tmp_path / "policy")
    for robot, dim in STATES.items():
        folder = tmp_path / "policy/robots" / robot
        assert main([str(folder), *(word for name in names for word in ("--compute", name))]) == 0
        images = {view: helpers.observation(number).images["image"] for number, view in enumerate(VIEWS[robot])}
        seen = Observation(images, np.arange(dim, dtype=np.float32), "Open a drawer")
        eager, policy = Policy.from_pretrained(folder), Policy.from_pretrained(folder, engine="aoti")
        for compute in map(parse, names):
            np.testing.assert_allclose(policy.act(seen, compute).actions, eager.act(seen, compute).actions, atol=1e-5)
        assert not policy.model.programs.missed


def test_a_damaged_program_is_refused(deployed, capsys):
    file = next(programs(deployed).glob("run-*"))
    file.write_bytes(b"nothing")
    with pytest.raises(DeploymentError, match=r"run-.* is missing or damaged.*vlaflow deploy .*policy --engine aoti"):
        Policy.from_pretrained(deployed, engine="aoti")
    found = store.find(fingerprint(deployed), "aoti")
    store.write(replace(found, measured=store.Speed(1.0, 2.0, 0.0)), programs(deployed))
    assert Policy.from_pretrained(deployed, engine="auto").model.engine == "eager"
    assert "is missing or damaged" in capsys.readouterr().err


def test_programs_that_give_another_chunk_are_not_kept(compiler, checkpoint, monkeypatch):
    """Nor do they take the place of good ones."""
    policy = Policy.from_pretrained(checkpoint)
    build(policy, checkpoint, PLAN, say=lambda program: None)
    kept = sorted(file.read_bytes() for file in programs(checkpoint).iterdir())
    wrong = lambda file: lambda tensors: [1.01 * out for out in compiler[file.read_bytes()](*tensors)]  # noqa: E731
    monkeypatch.setattr(aoti, "load", wrong)
    with pytest.raises(DeploymentError, match="they are not kept"):
        build(policy, checkpoint, PLAN, say=lambda program: None)
    assert sorted(file.read_bytes() for file in programs(checkpoint).iterdir()) == kept
    assert [place.name for place in store.root().iterdir()] == [programs(checkpoint).name]


def test_auto_takes_programs_only_where_they_are_faster(deployed):
    place, policy = programs(deployed), Policy.from_pretrained(deployed)
    found = store.find(fingerprint(deployed), "aoti")
    for milliseconds, engine in ((found.measured.eager / 2, "aoti f32"), (found.measured.eager * 2, "eager")):
        measured = store.Speed(milliseconds, found.measured.eager, 0.0)
        store.write(replace(found, measured=measured), place)
        assert with_engine(policy, "auto").model.engine == engine


@pytest.mark.parametrize(
    ("options", "milliseconds", "said", "unsaid"),
    [
        ((), 5.0, (), ("filled up", "stays eager")),
        (("--batch", "1", "--batch", "8"), 5.0, (), ("filled up", "stays eager")),
        (("--batch", "8"), 5.0, ("One observation is filled up to 8", "add --batch 1"), ("stays eager",)),
        (("--batch", "4", "--batch", "8"), 20.0, ("One observation is filled up to 4", "--engine auto stays eager"), ()),
    ],
)
def test_the_command_says_when_programs_gain_nothing(
    compiler, checkpoint, monkeypatch, capsys, options, milliseconds, said, unsaid
):
    """Of eight rows, one observation needs one, so programs of eight alone can lose against the networks."""
    monkeypatch.setattr(deployment, "_compared", lambda *_: store.Speed(milliseconds, 10.0, 1e-6))
    assert main([str(checkpoint), "--compute", "dense:2", *options]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in said), out
    assert not any(words in out for words in unsaid), out


def test_a_missing_compiler_is_one_sentence(monkeypatch, checkpoint):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CapabilityError, match=r"'no-such-compiler', which this machine lacks.*policies run eagerly"):
        build(Policy.from_pretrained(checkpoint), checkpoint, PLAN, say=lambda program: None)


def test_default_lengths_reach_the_longest_instruction(checkpoint):
    assert default_lengths(Policy.from_pretrained(checkpoint)) == (11, 32)


def test_a_pretrained_backbone_is_refused_in_a_sentence(compiler, checkpoint, monkeypatch):
    policy = Policy.from_pretrained(checkpoint)
    policy.model.backbone.spec = replace(policy.model.backbone.spec, rotary=True)
    with pytest.raises(CapabilityError, match=r"shapes depend on images and words.*--engine eager"):
        build(policy, checkpoint, PLAN, say=lambda program: None)
    assert not compiler


def as_tokens_see(prefix, inputs):
    return replace(prefix, mask_PP=torch.ones(prefix.hidden_BPW.shape[1], prefix.hidden_BPW.shape[1], dtype=torch.bool))


def as_if_masked(prefix, inputs):
    """Tokens are divided by the number of those that are no padding."""
    return replace(prefix, hidden_BPW=prefix.hidden_BPW / inputs.padding_mask_BP.sum(1)[:, None, None])


def as_if_unmasked(prefix, inputs):
    return replace(prefix, padding_mask_BP=None)


class Patched(Processor):
    """Two patches of each observation, in one row for all."""

    def __init__(self, own):
        self.own = own

    def __call__(self, observation):
        inputs = self.own(observation)
        return replace(inputs, patches=torch.zeros(2 * len(inputs), 3))

    def bucketed(self, lengths):
        return Patched(self.own.bucketed(lengths))


def with_prefix(policy, changed):
    """The policy with a backbone of another package, which embeds observations otherwise."""

    class Other(type(policy.model.backbone)):
        def embed(self, inputs):
            return changed(super().embed(inputs), inputs)

    policy.model.backbone.__class__ = Other
    return policy


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (as_tokens_see, "its prefix has positions or a mask"),
        (as_if_masked, "its embedding reads the padding mask"),
        (as_if_unmasked, "its prefix hides other tokens than the padding mask"),
    ],
)
def test_a_backbone_whose_prefix_programs_would_change_is_refused(compiler, checkpoint, changed, why):
    """A program is given the tokens and the processor's mask alone; another package's backbone may need more."""
    policy = with_prefix(Policy.from_pretrained(checkpoint), changed)
    with pytest.raises(CapabilityError, match=rf"A Other has no programs: {why}.*--engine eager"):
        build(policy, checkpoint, PLAN, say=lambda program: None)
    assert not compiler


def test_a_backbone_that_takes_pictures_of_any_size_is_refused(compiler, checkpoint):
    """A program would read pictures of another size as if they had the size that it was built for."""
    policy = Policy.from_pretrained(checkpoint)

    class AnySize(type(policy.model.backbone)):
        @property
        def views(self):
            return {"image": None}

    policy.model.backbone.__class__ = AnySize
    with pytest.raises(CapabilityError, match=r"A AnySize has no programs: it takes pictures of any size.*--engine eager"):
        build(policy, checkpoint, PLAN, say=lambda program: None)
    assert not compiler


def test_inputs_without_a_row_for_each_observation_are_refused(compiler, checkpoint):
    """A batch that is filled up to the next program's is filled up row by row."""
    policy = Policy.from_pretrained(checkpoint)
    policy = replace(policy, backbone_processor=Patched(policy.processor.backbone))
    with pytest.raises(CapabilityError, match="its processor makes tensors without a row for each observation"):
        build(policy, checkpoint, PLAN, say=lambda program: None)
    assert not compiler


def test_a_backbone_whose_prefix_has_no_state_is_deployed(compiler, checkpoint):
    """Only stacks that read the state themselves need it there."""
    policy = with_prefix(Policy.from_pretrained(checkpoint), lambda prefix, inputs: replace(prefix, state_BS=None))
    made = build(policy, checkpoint, PLAN, say=lambda program: None)
    assert {name.split("-")[0] for name in made.programs} == {"embed", "run", "step"}
    two = with_engine(policy, "aoti").act([SEEN, SEEN], Dense(2))  # more than there are programs for
    np.testing.assert_allclose(two[0].actions, policy.act(SEEN, Dense(2)).actions, atol=1e-5)


def test_a_budget_picks_among_engines(deployed, checkpoint):
    """The programs are eight times as fast, so more steps fit; without them, and where eager was asked for, fewer do."""
    weights = fingerprint(checkpoint)
    home = Checkpoint(checkpoint, weights)
    work, cost = ChunkWork(Work(), (Work(1),) * 2, (Work(1),) * 2), CostModel(1, 1, 1)
    eager = Profile(weights, processor(), 1, 1.0, (1.0, 2.0), (0.0, 2.0), 1.0, 20, {}, work, cost)
    programs = replace(eager, base=0.1, prefix=(0.1, 0.2), step=(0.0, 0.25), engine="aoti f32")
    save(Ladder(weights, "dd", 9, (Rung(2, 1, 0.4, 0.6), Rung(2, 10, 0.0, 0.5))), checkpoint / FOLDER / LADDER)
    save(eager, checkpoint / profile_file("eager"))
    save(programs, checkpoint / profile_file("aoti f32"))
    knobs = Knobs()
    assert for_budgets("auto", ("budget:6",), knobs, home) == ("aoti", replace(knobs, engine="aoti f32"))
    assert for_budgets("eager", ("budget:6",), knobs, home) == ("eager", knobs)
    assert for_budgets("auto", ("dense", "refine"), knobs, home) == ("auto", knobs)
    assert parse("budget:6", replace(knobs, engine="aoti f32"), home).steps == 10
    assert timed("auto", Policy.from_pretrained(checkpoint)) == ["eager", "aoti"]
    shutil.rmtree(store.root())
    assert for_budgets("auto", ("budget:6",), knobs, home) == ("eager", knobs)
    with pytest.raises(CalibrationError, match="Nothing fits 1 ms"):
        for_budgets("auto", ("budget:1",), knobs, home)
