"""Consistency distillation as a stage of a policy: what it measures, what it leaves alone, and how it is run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.training import flybot
from tests.training.small import Memory, new_policy, tiny_config, tiny_policy
from vlaflow.cli import train as command
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.consistency import Consistency
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.nn.precision import autocast
from vlaflow.policies.base import Policy
from vlaflow.policies.consistency_stage import ConsistencyStage
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.processor import Drawn
from vlaflow.policies.provenance import fingerprint, newest_state, run_of
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training.memory import count, measure
from vlaflow.training.trainer import Trainer

EXPERT = ExpertConfig(BlockConfig(width=24, heads=3, kv_heads=3, head_dim=8, ffn=32), projected=True)
TOKEN = FlowConfig(4, 6, masks="synchronous", expert=EXPERT, time_token=True)
FLOWS = {
    "through the backbone": FlowConfig(4, 6),
    "padded expert": FlowConfig(4, 6, padded_dim=7, expert=EXPERT, masks="synchronous", max_action_prefix=3),
    "time token": TOKEN,
    "behind latent tokens": LatentFlowConfig(TOKEN, LatentTokensConfig(2, 8), teaches=False),
}


def policy(decoder, seed, exits=None):
    config = replace(helpers.policy_config(), decoder=decoder, exits=exits)
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    made = Policy.create(config, helpers.action_spec(), stats, seed)
    made.model.eval()
    return made


def stage_of(decoder, consistency=None, exits=None):
    return ConsistencyStage(policy(decoder, 1, exits), policy(decoder, 2, exits), consistency or Consistency())


def ready_and_drawn(stage, size=3):
    ready = stage.prepare(helpers.batch(size))
    return ready, stage.draw(ready, *helpers.generators(2))


@pytest.mark.parametrize("decoder", FLOWS.values(), ids=FLOWS.keys())
def test_the_held_out_loss_is_the_distance_from_the_teachers_chunks(decoder):
    """From pure noise: one step of the policy against as many of its teacher as there are, whatever kind of flow it is."""
    stage = stage_of(decoder, Consistency(1, 4))
    ready = stage.prepare(helpers.batch(3))
    flow = getattr(decoder, "flow", decoder)
    noise_BLX = gaussian.standard_normal(helpers.generators(3), (6, flow.padded_dim or 4))
    one_BL = torch.ones(3, 6)
    for each in (stage.policy, stage.teacher):
        inner = getattr(each.model.decoder, "flow", each.model.decoder)
        inner.config = replace(inner.config, noise_samples=1)
    with torch.no_grad():
        found = stage.loss(ready, Drawn((one_BL, one_BL, one_BL, noise_BLX))).parts["velocity"]
        made_BLD, wanted_BLD = (
            each.model.decoder.sample(each.model.read(each.begin(ready)), helpers.generators(3), Sampling(steps))
            for each, steps in ((stage.policy, 1), (stage.teacher, 4))
        )
    torch.testing.assert_close(found, (made_BLD - wanted_BLD).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decoder", [FLOWS["through the backbone"], FLOWS["behind latent tokens"]], ids=["shared", "latent"])
def test_every_weight_that_learns_from_data_learns_from_the_teacher(decoder):
    """Also in bfloat16, where autocast keeps the weights that it casts for the pass that makes the target."""
    stage = stage_of(decoder, exits=ExitTraining((1, 2), shallow=0.2))
    model, (ready, drawn) = stage.module.train(), ready_and_drawn(stage)
    reached = []
    for loss in (stage.policy.loss_of, stage.loss):
        model.zero_grad(set_to_none=True)
        with autocast(True, torch.device("cpu")):
            total = loss(ready, drawn).total
        total.backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())})
    assert reached[0] == reached[1]
    assert all(p.grad is None for p in stage.teacher.model.parameters())


def test_a_random_exit_learns_the_full_depth():
    """The teacher answers at full depth, whichever exit of the policy a step trains."""
    stage = stage_of(FLOWS["through the backbone"], Consistency(1, 2, 2), ExitTraining((1, 2), choose="random"))
    ready, drawn = ready_and_drawn(stage)
    stage.module.train()
    depths, run = [], type(stage.teacher.model.decoder).velocity
    teacher, student = stage.teacher.model.decoder, stage.policy.model.decoder
    teacher.velocity = lambda x, t, prefix: depths.append(prefix.depth) or run(teacher, x, t, prefix)
    student.velocity = None  # the teacher walks all the way, so the policy's own estimate is not needed
    shallow = replace(drawn, integers=(1,))
    assert stage.loss(ready, shallow).total.isfinite()
    assert depths == [2, 2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "policy"
    new_policy(tiny_config(tiny_policy())).save_pretrained(folder)
    return folder


def arguments(recipe, dataset, out, *more):
    places = ["--dataset", str(dataset), "--out", str(out), "--tracker", "none", "--no-calibrate"]
    few = ("steps=4", "global_batch_size=4", "checkpoint_every=2", "validate_every=4", "precision=fp32")
    return [recipe, *places, *flybot.sets(few), *map(str, more)]


def test_a_distilled_checkpoint_is_a_policy_that_names_its_teacher_and_continues_bitwise(dataset, teacher, tmp_path, cut):
    before = fingerprint(teacher)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command.main(arguments("asyncvla.consistency", dataset, whole, "--policy", teacher)) == 0
    cut("asyncvla.consistency", 3, flybot.break_down)
    with pytest.raises(RuntimeError, match="cut"):
        command.main(arguments("asyncvla.consistency", dataset, parts, "--policy", teacher))
    assert newest_state(parts)[0] == 2
    cut("none", 0, flybot.break_down)
    assert command.main(arguments("asyncvla.consistency", dataset, parts, "--policy", teacher)) == 0
    assert flybot.same(whole, parts)
    assert fingerprint(teacher) == before == run_of(whole)["policy"]
    assert run_of(whole)["config"]["objective"]["consistency"]["teacher_steps"] == 10
    made = Policy.from_pretrained(whole)
    assert made.config == Policy.from_pretrained(teacher).config
    assert "## Consistency distillation of the policy" in made.card
    with pytest.raises(ConfigError, match=r"was trained with config\.objective\.consistency\.steps = 1, now it is 2"):
        command.main(arguments("asyncvla.consistency", dataset, whole, "--policy", teacher, "--set", "consistency.steps=2"))


def test_distillation_brings_one_step_near_the_teachers_chunks(tmp_path):
    """The held-out loss, which is the distance between the two, falls; the fields of these random networks are far from 0."""
    policy, teacher = new_policy(tiny_config()), new_policy(tiny_config())
    with torch.no_grad():
        for each in (policy, teacher):
            each.model.decoder.codec.head[-1].weight *= 4
    stage = ConsistencyStage(policy, teacher, Consistency(stride=10))
    ready = stage.prepare(Memory().batch(np.arange(16)))
    drawn = stage.draw(ready, *helpers.generators(2))

    def distance():
        stage.module.eval()
        with torch.no_grad():
            return float(stage.loss(ready, drawn).total)

    before = distance()
    config = tiny_config(steps=24, checkpoint_every=24, shift=0, ema_decay=None)
    Trainer(stage, config, Memory(), None, tmp_path / "p", tracker="none").run()
    assert distance() < 0.6 * before


def test_what_cannot_be_distilled_is_said_in_a_sentence(dataset, tmp_path):
    regression = policy(RegressionConfig(4, 6), 0)
    with pytest.raises(
        CapabilityError, match="needs a continuous flow, which a RegressionDecoder is not; leave consistency out"
    ):
        ConsistencyStage(regression, regression, Consistency())
    with pytest.raises(CapabilityError, match="A RegressionDecoder has no velocity that another could learn"):
        regression.model.decoder.velocity_field(None)
    with pytest.raises(ConfigError, match=r"starts from a trained policy\. Use a recipe that continues one"):
        command.main(arguments("asyncvla.demo", dataset, tmp_path / "p", "--set", "consistency={}"))


def test_a_plan_counts_the_teacher_and_trains_the_policy():
    plain = PolicyObjective(helpers.policy_config())
    taught = replace(plain, consistency=Consistency())
    alone = count(lambda: plain.dry_run(None, 16), tiny_config(objective=plain))
    both = count(lambda: taught.dry_run(None, 16), tiny_config(objective=taught))
    assert (both.parameters, both.trained) == (2 * alone.parameters, alone.trained)
    assert both.optimizer_bytes == alone.optimizer_bytes
    assert measure(lambda: taught.dry_run(None, 16), tiny_config(objective=taught), 2, bf16=False).flops > 0
