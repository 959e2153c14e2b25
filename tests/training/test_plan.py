"""What ``vlaflow plan`` says is what torch allocates, what the cost model counts, and what the recipes' docstrings claim."""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost_model.shapes import PolicyShape
from benchmarks.cost_model.shapes_of import Grid, flow_decoder, qwen_backbone
from tests import helpers
from tests.training.flybot import sets
from tests.training.small import tiny_config, tiny_policy, write_dataset
from vlaflow.backbones.qwen2_5_vl import qwen2_5_vl_3b
from vlaflow.cli.main import main
from vlaflow.cli.plan import answer, cache_command
from vlaflow.config import to_json
from vlaflow.data.filters import Filters, filtered
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.flow import FlowConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.dry_run import acting
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.policy_config import PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig, ParameterGroup
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training import estimate as module
from vlaflow.training.estimate import Estimate, Machine, TrainingData, estimate, needs
from vlaflow.training.memory import Counts, StepCost, copies, count, measure, sharded
from vlaflow.training.moments import Masters
from vlaflow.training.optim import build_optimizer
from vlaflow.training.recipes import find_recipe, list_recipes

LIBERO = TrainingData()
EXPERT = ExpertConfig(BlockConfig(32, 2, 2, 16, 64))
BATCH = 64


def objective(expert):
    return PolicyObjective(helpers.policy_config(expert=EXPERT if expert else None))


def allocated(step):
    """The most bytes that torch holds at once while a function runs, beyond what it held before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("expert", "bf16"), [(False, False), (True, False), (False, True)])
def test_memory_is_within_a_tenth_of_what_torch_allocates(expert, bf16):
    """Of a step in two parts, whose gradients are held while the second part's activations are kept; and of AdamW's moments."""
    learned = objective(expert)
    config = tiny_config(objective=learned)

    def build():
        return learned.dry_run(None, 16)

    counts, needed = count(build, config), measure(build, config, BATCH, bf16=bf16)
    run = build()
    run.networks.train()
    memory = copies(counts, 1, averaged=True, activations=needed.activations)

    def parts():
        run.networks.zero_grad(set_to_none=True)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total = run.loss(BATCH, run.depth)
            torch.autograd.backward(total)

    assert memory.gradients + memory.activations == pytest.approx(allocated(parts), rel=0.1)
    optimizer = build_optimizer(run.networks, config.optim, Masters(run.networks))
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    unused = sum(p.nbytes for p in run.networks.parameters() if p.grad is None)  # of the last layer that an expert reads
    assert memory.optimizer == pytest.approx(moments + 2 * unused, rel=0.1)
    assert memory.weights == sum(p.nbytes for p in run.networks.state_dict().values())


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_a_pretrained_backbone_are_those_that_torch_keeps(tmp_path, recompute):
    """Also where layers are computed again in the backward pass, so that only the inputs of each are kept."""
    pytest.importorskip("transformers")
    from tests.backbones.test_qwen2_5_vl import qwen_config, write_model

    backbone = qwen_config(write_model(tmp_path, tied=True), recompute=recompute)
    decoder = FlowConfig(action_dim=4, chunk_size=6, padded_dim=8)
    learned = PolicyObjective(PolicyConfig("asyncvla", backbone, decoder, n_action_steps=3))
    config, side = tiny_config(objective=learned), 56
    run = learned.dry_run(None, side)
    unseen = 4 * run.unseen(BATCH)
    needed = measure(lambda: learned.dry_run(None, side), config, BATCH, bf16=False).activations - unseen
    run.networks.train()
    for parameter in run.networks.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    assert needed == pytest.approx(allocated(lambda: torch.autograd.backward(run.loss(BATCH, run.depth))), rel=0.1)


def test_parameters_are_those_of_the_cost_model():
    config = find_recipe("asyncvla.libero").config(LIBERO.spec)
    backbone = qwen_backbone(qwen2_5_vl_3b(), Grid(9, 2), 52)
    shape = PolicyShape(backbone, flow_decoder(config.objective.policy.decoder, backbone.spec))
    assert count(lambda: config.objective.dry_run(None, 256), config).parameters == shape.parameters


BASES = {"asyncvla.rater3b": "asyncvla.libero", "iflybot.fine3b": "iflybot.joint3b"}
LARGE = [name for name, recipe in list_recipes().items() if "accelerate launch" in (recipe.call.__doc__ or "")]
ONE_GPU = ["asyncvla.robot3b"]


@pytest.mark.parametrize("name", LARGE + ONE_GPU)
def test_a_recipe_states_what_it_needs(name):
    policy = find_recipe(BASES[name]).config(LIBERO.spec).objective.policy if name in BASES else None
    recipe = find_recipe(name)
    said = " ".join((recipe.call.__doc__ or "").split())
    assert needs(recipe.config(LIBERO.spec, policy), LIBERO, policy) in said


COUNTS = Counts(
    parameters=1000,
    trained=800,
    weight_bytes=4000,
    gradient_bytes=3200,
    optimizer_bytes=6400,
    root=200,
    root_trained=200,
    largest=50,
    matrices=700,
    root_matrices=100,
)


@pytest.mark.parametrize("name", ["baselines.fast_ar", "dfm_vla.demo_fast"])
def test_a_tokenizer_that_only_the_data_can_decide_is_planned_with_as_many_tokens_as_movements_need(name):
    """White noise needs more than the small backbone has positions for, and plan refused what train does on LIBERO's shape."""
    config = find_recipe(name).config(LIBERO.spec)
    assert torch.isfinite(acting(config.objective.policy, 96).loss(1, 4))


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_shards_add_up_to_one_copy(gpus):
    whole, share = copies(COUNTS, gpus, averaged=True), sharded(COUNTS, gpus, averaged=True, bf16=True)
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(share, part) * gpus == getattr(whole, part)
    assert share.buckets == 4 * (200 + 200) + 2 * 2 * 50 + 2 * 4 * 50
    assert copies(COUNTS, 1, averaged=True).buckets == 0


def test_networks_without_layers_are_copied():
    plain = replace(COUNTS, largest=0)
    assert sharded(plain, 8, averaged=False, bf16=True) == copies(plain, 8, averaged=False)


def test_frozen_weights_need_neither_gradients_nor_moments():
    optim = OptimConfig(groups=(ParameterGroup("backbone.", frozen=True),))
    counts = count(lambda: objective(False).dry_run(None, 16), tiny_config(optim=optim))
    decoder = sum(p.numel() for p in objective(False).dry_run(None, 16).networks.decoder.parameters())
    assert counts.trained == decoder < counts.parameters
    assert copies(counts, 2, averaged=False).optimizer == 8 * decoder


def planned(gib, activations=1000.0):
    config = tiny_config(global_batch_size=64)
    machine = Machine(2, gib / 2**30 + 2)
    return Estimate(config, COUNTS, StepCost(activations, 1e12), 32, machine, LIBERO)


def test_what_would_fit_has_the_fewest_gpus_and_the_largest_parts():
    """Copies of two GPUs take 4000 + 5 · 3200 bytes besides activations, shards of two about half."""
    assert not planned(1000).fitting()
    roomy = planned(30_000).fitting()
    assert (roomy.shard, roomy.gpus, roomy.part) == (False, 2, 32)
    tight = planned(14_000).fitting()
    assert (tight.shard, tight.gpus, tight.part) == (True, 2, 32)
    smaller = planned(30_000, activations=25_000.0).fitting()
    assert (smaller.gpus, smaller.part) == (2, 16)
    more = planned(8_000).fitting()
    assert (more.shard, more.gpus) == (True, 4)


def test_epochs_and_hours_follow_from_the_recipe():
    config = tiny_config(global_batch_size=64, steps=100)
    machine, data = Machine(4, tflops=1.0), TrainingData(DataSpec(3, 2, ("front",)), 6400, 10)
    found = Estimate(replace(config, validation_fraction=0.5), COUNTS, StepCost(0.0, 1e12), 16, machine, data)
    assert found.epochs == 2
    assert found.cache == 6400 * 32 * 32 * 3  # at the size that the policy reads, not at the data set's
    assert cache_command("data/theirs", found.config) == "vlaflow data cache data/theirs --size 32"
    jpegs = cache_command("data/theirs", replace(config, frames="jpeg"))
    assert jpegs == "vlaflow data cache data/theirs --size 32 --frames jpeg"
    assert found.hours == pytest.approx(100 * 4 / (4 * 0.4) / 3600)


def test_the_command_plans_every_stage_and_says_what_fits(capsys):
    """The demo on one GPU."""
    assert main(["plan", "asyncvla.demo", "--gpus", "1", "--memory", "8", "--set", "ema_decay=none"]) == 0
    said = capsys.readouterr().out
    assert "parameters" in said
    assert "average" not in said
    assert "Fits: 1 GPU (" in said
    assert "Nothing that was tried fits" in answer(planned(1000), "")
    assert answer(planned(8_000), "").startswith("Fits: 4 GPUs, --shard (")
    assert "--set accumulate=4" in answer(planned(30_000, activations=25_000.0), "")
    assert main(["plan", "asyncvla.rater"]) == 2
    assert "name its checkpoint with --policy" in capsys.readouterr().err


@pytest.fixture
def estimated(monkeypatch):
    """What the command would estimate: configs and policies of the stages."""
    asked = []

    def remember(config, machine, data, policy=None):
        asked.append((config, policy))
        return Estimate(config, COUNTS, StepCost(1.0, 1.0), 1, machine, data)

    monkeypatch.setattr(module, "estimate", remember)
    return asked


def test_a_pipeline_is_planned_with_the_overrides_that_train_takes(estimated, capsys):
    changes = ["joint.steps=7", "joint.policy.n_action_steps=5", "joint.policy.backbone.depth=3", "fine.steps=9"]
    main(["plan", "iflybot.demo", "--gpus", "1", *sets(changes)])
    (latent, _), (joint, none), (fine, continued) = estimated
    assert (joint.steps, fine.steps, none) == (7, 9, None)
    assert latent.steps == find_recipe("iflybot.latent").config(LIBERO.spec).steps
    assert continued == joint.objective.policy
    assert (continued.n_action_steps, fine.objective.policy.backbone.depth) == (5, 3)
    assert main(["plan", "iflybot.demo", "--set", "steps=7"]) == 2
    assert "'steps' names no stage of 'iflybot.demo', as --set fine.steps=... would" in capsys.readouterr().err


def test_seconds_of_a_chunk_need_the_rate_of_a_data_set(estimated, tmp_path, capsys):
    for how in (["--chunk-seconds", "2"], ["--set", "chunk_s=2"]):
        assert main(["plan", "asyncvla.demo", "--gpus", "1", *how]) == 2
        assert "name one with --dataset" in capsys.readouterr().err
    assert not estimated
    dataset = write_dataset(tmp_path / "dataset")
    main(["plan", "asyncvla.demo", "--gpus", "1", "--dataset", str(dataset), "--chunk-seconds", "2"])
    main(["plan", "iflybot.demo", "--gpus", "1", "--dataset", str(dataset), "--chunk-seconds", "2"])
    (alone, _), _, (joint, _), (_, continued) = estimated
    assert {each.decoder.chunk_size for each in (alone.objective.policy, joint.objective.policy, continued)} == {20}


def test_seconds_of_a_chunk_change_no_policy_that_is_continued(estimated, tmp_path, capsys):
    dataset, checkpoint = write_dataset(tmp_path / "dataset"), tmp_path / "policy"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(to_json(tiny_policy())))
    given = ["plan", "asyncvla.finetune", "--gpus", "1", "--dataset", str(dataset), "--policy", str(checkpoint)]
    assert main([*given, "--chunk-seconds", "2"]) == 2
    assert "keep their 4 actions, and 2 s are 20. Leave --chunk-seconds (chunk_s) out" in capsys.readouterr().err
    assert not estimated
    main([*given, "--chunk-seconds", "0.4"])
    assert len(estimated) == 1


def test_the_command_for_the_cache_reads_the_data_as_training_does(estimated, tmp_path, capsys):
    """And where training streams, there is none."""
    given = ["plan", "baselines.flow", "--gpus", "1", "--dataset", str(write_dataset(tmp_path / "dataset"))]
    main([*given, "--view", "top=front"])
    assert f"vlaflow data cache {tmp_path / 'dataset'} --size 96 --view top=front" in capsys.readouterr().out
    main([*given, "--set", "frames=stream"])
    assert "data cache" not in capsys.readouterr().out


def test_epochs_are_of_the_episodes_that_are_learned_from(estimated, tmp_path, capsys):
    """Of six episodes of 9 to 14 frames, those of each task in turns."""
    dataset = str(write_dataset(tmp_path / "dataset"))
    given = ["plan", "baselines.flow", "--gpus", "1", "--set", "steps=36", "--set", "global_batch_size=1", "--set"]
    main([*given, 'hold_out_tasks=["push the puck"]', "--dataset", dataset])
    assert "1.0 epochs of 36 frames" in " ".join(capsys.readouterr().out.split())
    main([*given, "demonstrations=0.34", "--set", "validation_fraction=0", "--dataset", dataset])
    config = estimated[-1][0]
    assert len(config.episodes(Dataset.open(dataset))[0]) == 2
    learned = sum(9 + episode for episode in config.episodes(Dataset.open(dataset))[0])
    assert f"of {learned} frames" in " ".join(capsys.readouterr().out.split())
    main([*given, 'filters={"static": 0.9}', "--set", "validation_fraction=0", "--dataset", dataset])
    begin = int((~filtered(Dataset.open(dataset), Filters(static=0.9)).no_start_N).sum())
    assert begin < len(Dataset.open(dataset))
    assert f"of {begin} frames" in " ".join(capsys.readouterr().out.split())
    assert main([*given, 'hold_out_tasks=["push the puck"]']) == 2
    assert "name one with --dataset" in capsys.readouterr().err
    shape = TrainingData(frames=1000)
    half = tiny_config(steps=100, global_batch_size=4, validation_fraction=0.0, demonstrations=0.5)
    assert Estimate(half, COUNTS, StepCost(1.0, 1.0), 1, Machine(1), shape).epochs == 0.8


def test_an_estimate_splits_the_batch_over_the_gpus(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda build, config, part, *, bf16: StepCost(part, part))
    config = tiny_config(objective=objective(False), global_batch_size=8, accumulate=2)
    assert estimate(config, Machine(1), TrainingData(DataSpec(4, 4, ("image",)), 100, 16)).part == 4
    assert estimate(config, Machine(4), TrainingData(DataSpec(4, 4, ("image",)), 100, 16)).part == 2
