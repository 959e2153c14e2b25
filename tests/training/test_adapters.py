"""Low-rank adapters, small optimiser states and bfloat16 weights, on a small random Llama."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.backbones.smol import write_model
from tests.training.small import SPEC, Cut, Memory, tiny_config, tiny_stats, weights
from vlaflow.backbones.smol import SmolConfig
from vlaflow.config import override
from vlaflow.decoders.flow import FlowConfig
from vlaflow.errors import CapabilityError, CheckpointError, ConfigError
from vlaflow.policies.adapters import LoraConfig, Merged, adapt
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import OptimConfig
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.metrics_log import read_log
from vlaflow.training.moments import Masters
from vlaflow.training.optim import build_optimizer
from vlaflow.training.trainer import Trainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
BITS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("smol"))


def policy(folder, **backbone):
    config = SmolConfig(3, ("front",), str(folder), image_size=32, **backbone)
    return PolicyConfig("asyncvla", config, FlowConfig(action_dim=2, chunk_size=4), n_action_steps=2)


def trainer(out, config, source=None):
    made = Policy.create(config.objective.policy, SPEC, tiny_stats(), 0)
    return Trainer(PolicyStage(made), config, source or Memory(), None, out, tracker="none")


def adapting(folder, lora=LORA, **changes):
    changes = {"ema_decay": 0.9, "optim": OptimConfig(learning_rate=1e-2, warmup_steps=2), **changes}
    return tiny_config(objective=PolicyObjective(policy(folder)), lora=lora, **changes)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of six steps, and its trainer."""
    out = tmp_path_factory.mktemp("adapted")
    run = trainer(out, adapting(folder))
    run.run()
    return run, out


def test_only_the_adapters_and_what_is_not_pretrained_train(folder, trained):
    before = Policy.create(policy(folder), SPEC, tiny_stats(), 0).model.state_dict()
    after = trained[0].stage.module.state_dict()
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items() if ".lora_" not in name}
    assert plain.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], plain[name])}
    assert changed == {name for name in before if not name.startswith("backbone.network.")}
    assert sum(".lora_A." in name for name in after) == 3 * 7


def test_the_checkpoint_is_the_merged_network_and_opens_without_peft(folder, trained, monkeypatch):
    """y = W x + (alpha / rank) B A x for the averaged adapters, under W's own name."""
    run, out = trained
    monkeypatch.setattr("vlaflow.packages._installed", lambda package: package != "peft")
    opened = Policy.from_pretrained(out)
    state = run.stage.module.state_dict()
    average = {**state, **load_file(out / "training/step-000006/average.safetensors")}
    path = "backbone.network.layers.1.mlp.up_proj"
    base, down, up = (average[f"{path}.{part}.weight"] for part in ("base_layer", "lora_A.default", "lora_B.default"))
    assert up.abs().max() > 0
    torch.testing.assert_close(opened.model.state_dict()[f"{path}.weight"], base + 2.0 * up @ down)
    assert not any("lora" in name for name in opened.model.state_dict())
    with run._ema.in_module():
        stage = run.stage
        batch = stage.prepare(Memory().batch(torch.arange(4).numpy()))
        losses = [
            each.loss(batch, torch.Generator().manual_seed(0), torch.Generator()).total for each in (stage.policy, opened)
        ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_run_that_was_cut_continues_to_the_bit_and_states_hold_no_pretrained_weight(folder, trained, tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        trainer(tmp_path / "p", adapting(folder), Cut(Memory(), at=6)).run()
    trainer(tmp_path / "p", adapting(folder)).run()
    assert weights(tmp_path / "p") == weights(trained[1])
    names = load_file(tmp_path / "p/training/step-000006/weights.safetensors").keys()
    assert any(".lora_B." in name for name in names)
    assert not any("base_layer" in name or "embed_tokens" in name for name in names)


def test_other_pretrained_weights_than_the_run_began_with_are_refused(folder, tmp_path):
    config = adapting(folder, steps=4)
    with pytest.raises(RuntimeError, match="cut"):
        trainer(tmp_path / "p", config, Cut(Memory(), at=3)).run()
    other = trainer(tmp_path / "p", config)
    other.stage.module.backbone.network.norm.weight.data += 1
    with pytest.raises(CheckpointError, match=r"not those that the run in .* began with"):
        other.run()


def test_targets_and_their_rate_are_chosen_by_name(folder):
    lora = LoraConfig(rank=2, targets=("q_proj", "v_proj"), learning_rate=3e-3)
    model = Policy.create(policy(folder), SPEC, tiny_stats(), 0).model
    names = adapt(model, lora, seed=0)
    assert {name.split(".")[5] for name in names} == {"q_proj", "v_proj"}
    again = Policy.create(policy(folder), SPEC, tiny_stats(), 0).model
    adapt(again, lora, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    merged = Merged(model)  # B is zero before the first step
    plain = Policy.create(policy(folder), SPEC, tiny_stats(), 0).model.state_dict()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    with pytest.raises(ConfigError, match=r"'q_prj' \(lora\.targets\); did you mean 'q_proj'"):
        adapt(Policy.create(policy(folder), SPEC, tiny_stats(), 0).model, replace(lora, targets=("q_prj",)), seed=0)
    with pytest.raises(ConfigError, match="Set lora=none"):
        adapt(torch.nn.Linear(2, 2), lora, seed=0)


def test_a_command_line_turns_adapters_on_and_off():
    config = override(tiny_config(), {"lora": "{}", "lora.rank": "8"})
    assert config.lora == LoraConfig(rank=8)
    assert override(config, {"lora": "none"}).lora is None


def test_adapters_train_in_float32_on_weights_in_bfloat16(folder, tmp_path):
    """So they may be averaged, and need no masters; the checkpoint is in bfloat16 again."""
    config = tiny_config(
        objective=PolicyObjective(policy(folder, dtype="bfloat16", layers=1)), lora=LORA, ema_decay=0.9, steps=2
    )
    trainer(tmp_path / "a", config).run()
    average = load_file(tmp_path / "a/training/step-000002/average.safetensors")
    assert {tensor.dtype for name, tensor in average.items() if ".lora_" in name} == {torch.float32}
    found = Policy.from_pretrained(tmp_path / "a").model.backbone.language.layers[0].self_attn.q_proj.weight
    assert found.dtype == torch.bfloat16


def test_what_is_missing_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr("vlaflow.packages._installed", lambda package: package not in ("peft", "bitsandbytes"))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CapabilityError, match=r"'peft', which is not installed: pip install 'vlaflow\[lora\]'"):
        adapt(model, LORA, seed=0)
    with pytest.raises(CapabilityError, match=r"adamw8bit .*pip install 'vlaflow\[bits\]'"):
        build_optimizer(model, OptimConfig(kind="adamw8bit"))


# -- weights in bfloat16 -------------------------------------------------------------------------------------------------


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    """A hundred steps of 1e-4 from 1, where bfloat16 has nothing between 1 and 0.996."""
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    masters = Masters(module)
    optimizer = build_optimizer(module, OptimConfig(learning_rate=1e-4, weight_decay=0.0), masters)
    for _ in range(100):
        module.zero_grad()
        module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert masters.of[module.weight].item() == pytest.approx(0.99, abs=1e-4)
    assert module.weight.item() == masters.of[module.weight].bfloat16().item() < 1


def test_bfloat16_weights_continue_to_the_bit_and_are_not_averaged(folder, tmp_path):
    objective = PolicyObjective(policy(folder, dtype="bfloat16", layers=1))
    config = tiny_config(objective=objective, ema_decay=None)
    trainer(tmp_path / "a", config).run()
    with pytest.raises(RuntimeError, match="cut"):
        trainer(tmp_path / "b", config, Cut(Memory(), at=4)).run()
    trainer(tmp_path / "b", config).run()
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    moments = load_file(tmp_path / "a/training/step-000006/optimizer.safetensors")
    assert moments["master.backbone.network.norm.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="ema_decay=none"):
        trainer(tmp_path / "c", replace(config, ema_decay=0.9)).run()


# -- bitsandbytes, on the CPU; where it is installed ---------------------------------------------------------------------


@BITS
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("kind", "quantise"), [("adamw8bit", None), ("paged_adamw8bit", "nf4")])
def test_small_states_and_four_bits_learn_nearly_the_same_and_continue_to_the_bit(folder, trained, tmp_path, kind, quantise):
    lora = replace(LORA, quantise=quantise)
    config = adapting(folder, lora, optim=OptimConfig(kind=kind, learning_rate=1e-2, warmup_steps=2))
    trainer(tmp_path / "a", config).run()
    with pytest.raises(RuntimeError, match="cut"):
        trainer(tmp_path / "b", config, Cut(Memory(), at=6)).run()
    trainer(tmp_path / "b", config).run()
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    ours, theirs = ([entry["loss"] for entry in read_log(each)] for each in (tmp_path / "a", trained[1]))
    assert ours == pytest.approx(theirs, rel=0.1)
    moments = load_file(tmp_path / "a/training/step-000006/optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in moments.values())
    plain = Policy.create(policy(folder), SPEC, tiny_stats(), 0).model.state_dict()
    found = Policy.from_pretrained(tmp_path / "a").model.state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in plain.items()}
