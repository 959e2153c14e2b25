"""What is no number is refused: weights and statistics when a checkpoint is opened, chunks when they are made."""

import json
from dataclasses import replace
from itertools import count
from math import inf, nan

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests import helpers
from tests.decoders import test_latent_flow as latent
from tests.serving.live import request, serving
from vlaflow.actions.latent import LatentActionModel, LatentConfig, Origin
from vlaflow.compute.calibration import Calibration, ExitEffect, RiskTarget
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.parse import able
from vlaflow.compute.refine_tokens import Improbable, RefineTokens
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.errors import CalibrationError, CheckpointError, NotFiniteError, RequestError, SpecError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.robot.client import Client


def with_exits(decoder):
    config = replace(helpers.policy_config(), decoder=decoder, exits=ExitTraining((1, 2)))
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    made = Policy.create(config, helpers.action_spec(4), stats, 0)
    made.model.eval()
    return made


POLICIES = {
    "flow with a rater": lambda: helpers.policy(rater=True),
    "regression": lambda: with_exits(RegressionConfig(4, chunk_size=6)),
    "autoregressive": lambda: helpers.token_policy(AutoregressiveConfig),
    "masked diffusion": lambda: helpers.token_policy(MaskedDiffusionConfig),
    "discrete flow": lambda: helpers.token_policy(DiscreteFlowConfig),
    "discrete flow, top guess": lambda: helpers.token_policy(DiscreteFlowConfig, guess="top"),
    "latent flow": latent.policy,
}


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("kind", POLICIES)
def test_no_compute_policy_answers_with_an_action_that_is_no_number(kind, value):
    """Neither as a chunk, nor as tokens whose logits are NaN."""
    made = POLICIES[kind]()
    with torch.no_grad():
        made.model.backbone.state.weight.fill_(value)
    computes = able(made.model)
    if len(made.model.depths) > 1:
        plan = ExitPlan(made.model.depths, sampling=Sampling(3))
        computes.append(EarlyExit(plan, (inf,) * len(plan.exits)))
    assert computes
    for compute in computes:
        with pytest.raises(NotFiniteError, match="is no action"):
            made.act(helpers.observation(), compute)


def test_tokens_that_are_regenerated_from_scores_that_are_no_numbers_become_no_chunk(monkeypatch):
    """Every id decodes to a chunk, and a mean of chunks keeps no probabilities that would tell."""
    made = helpers.token_policy(MaskedDiffusionConfig)
    head, compute = made.model.decoder.head, RefineTokens(Improbable(1.0), Sampling(2), Dense(3))
    looks = count()
    monkeypatch.setattr(head, "forward", lambda x: functional.linear(x, head.weight) * (nan if next(looks) >= 3 else 1))
    with pytest.raises(NotFiniteError):
        made.act(helpers.observation(), Consensus(1, "mean", compute))


def test_an_infinite_action_is_not_clipped_into_the_range():
    made = helpers.policy()
    with torch.no_grad():
        made.model.decoder.codec.head[-1].bias.fill_(-inf)
    with pytest.raises(NotFiniteError):
        made.act(helpers.observation())


def test_a_chunk_of_another_shape_than_was_promised_is_an_error(monkeypatch):
    """As another package's decoder may make: a robot would execute fewer actions than the metadata says."""
    policy = helpers.policy()
    finish = policy.model.decoder.finish
    monkeypatch.setattr(policy.model.decoder, "finish", lambda state: finish(state)[:, :-1])
    with pytest.raises(SpecError, match=r"a chunk of shape \(5, 4\), and its config and action spec say \(6, 4\)"):
        policy.act(helpers.observation())


def test_a_rating_that_is_no_number_is_an_error():
    made = helpers.policy(rater=True)
    with torch.no_grad():
        next(p for p in made.model.rater.parameters() if p.ndim == 2).fill_(nan)
    refine = next(compute for compute in able(made.model) if compute.needs.rater)
    with pytest.raises(NotFiniteError):
        made.act(helpers.observation(), refine)


def test_a_state_beyond_all_units_is_an_error_and_its_neighbour_in_the_batch_is_answered():
    made, good = helpers.policy(), helpers.observation()
    wild = replace(good, state=np.full(4, 3e38, np.float32))
    with pytest.raises(NotFiniteError, match="units of training"):
        made.act(wild)
    with serving(made) as (_, address), Client(address) as client:
        with pytest.raises(RequestError, match="is no action"):
            client.infer({**request(), "observation/state": wild.state})
        assert np.isfinite(client.infer(request())["actions"]).all()


@pytest.fixture
def checkpoint(tmp_path):
    helpers.policy(rater=True).save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def rewrite(folder, change):
    """Change one tensor of a checkpoint."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, made in change.items():
        weights[name] = made(weights[name])
    save_file(weights, file)


def poison(value):
    def changed(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["backbone.norm.weight", "rater."])
def test_weights_that_are_not_finite_are_refused_by_file_and_name(checkpoint, name, value):
    name = next(own for own in load_file(checkpoint / "model.safetensors") if own.startswith(name))
    rewrite(checkpoint, {name: poison(value)})
    with pytest.raises(CheckpointError, match=rf"'{name}' in .*model\.safetensors contains NaN or an infinite value"):
        Policy.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_weights_of_another_type_are_refused_not_cast(checkpoint, dtype):
    rewrite(checkpoint, {"backbone.norm.weight": lambda tensor: tensor.to(dtype)})
    with pytest.raises(CheckpointError, match=rf"'backbone\.norm\.weight' in .* is of type {str(dtype)[6:]}, .* float32"):
        Policy.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_open_exactly_in_the_networks_type(checkpoint, dtype):
    rewrite(checkpoint, {"backbone.norm.weight": lambda tensor: (tensor * 0.3).to(dtype)})
    saved = load_file(checkpoint / "model.safetensors")["backbone.norm.weight"]
    own = Policy.from_pretrained(checkpoint).model.backbone.norm.weight
    assert own.dtype == torch.float32
    assert torch.equal(own, saved.float())


@pytest.mark.parametrize("value", [nan, inf, -1e39])
@pytest.mark.parametrize("feature", ["state", "action"])
def test_statistics_that_are_not_finite_are_refused_by_file_and_name(checkpoint, feature, value):
    """Finite in float32, that is, which the networks compute in."""
    file = checkpoint / "stats.json"
    stats = json.loads(file.read_text())
    stats[feature]["mean"][1] = value
    file.write_text(json.dumps(stats))
    with pytest.raises(CheckpointError, match=rf"'{feature}' in .*stats\.json holds a 'mean' that is not finite"):
        Policy.from_pretrained(checkpoint)


def test_statistics_of_unequal_length_are_refused(checkpoint):
    file = checkpoint / "stats.json"
    stats = json.loads(file.read_text())
    stats["state"]["std"].pop()
    file.write_text(json.dumps(stats))
    with pytest.raises(CheckpointError, match="4 minima, but 'std' is of length 3"):
        Policy.from_pretrained(checkpoint)


def test_a_latent_action_model_that_is_not_finite_is_refused(tmp_path):
    shape = LatentConfig(
        image_size=16, patch=4, width=16, heads=2, ffn=32, spatial=1, decoder=1, grid=(1, 2), code_dim=4, book=4
    )
    LatentActionModel.create(shape, Origin("d", "image", 10.0, 0.5, 5), 0).save_pretrained(tmp_path)
    LatentActionModel.from_pretrained(tmp_path)
    rewrite(tmp_path, {"book.entry_VE": poison(nan)})
    with pytest.raises(CheckpointError, match=r"'book\.entry_VE' in .* NaN"):
        LatentActionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [nan, inf])
def test_a_calibration_with_a_threshold_that_is_not_finite_is_refused(tmp_path, value):
    """NaN would never leave early and an infinite one always, whatever was measured."""
    target = RiskTarget(0.1, 0.1, 0.05, "max_abs")
    effect = ExitEffect(9, (0.5, 0.5), 2.0, 3.0, 3.0, 0.1, 0.2, 0.2, 0.0)
    made = Calibration("c", "d", ExitPlan((1, 2)), (0.5,), target, 9, effect, "vlaflow calibrate", {})
    made.save(tmp_path / "good.json")
    assert Calibration.load(tmp_path / "good.json") == made
    written = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(written | {"thresholds": [value]}))
    with pytest.raises(CalibrationError, match=r"bad\.json holds a threshold that is not finite"):
        Calibration.load(tmp_path / "bad.json")
