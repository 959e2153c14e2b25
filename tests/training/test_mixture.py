"""A policy that learns from two robots at once: what is the same as without the other, and what each robot gets."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.latents import SMALL, latent_config
from tests.training.small import SPEC, as_it_is, tiny_config, tiny_policy, weights, write_questions
from tests.training.two_robots import WIDE, mixed_config, write_wide
from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FastFit
from vlaflow.actions.latent import LatentActionModel
from vlaflow.cli import calibrate
from vlaflow.cli import export as export_command
from vlaflow.compute.dense import Dense
from vlaflow.compute.refine import Refine
from vlaflow.data.filters import Filters
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import Mixed
from vlaflow.data.weights import DatasetEntry
from vlaflow.data.writer import Writer
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.decoders.token_metrics import BinMetric
from vlaflow.errors import ConfigError, SpecError
from vlaflow.evaluation.check_policy import check_policy
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.asyncvla.policy import tiny_rater
from vlaflow.policies.base import Policy
from vlaflow.policies.latent_pairs import Paired, pairs_of
from vlaflow.policies.lerobot import export
from vlaflow.policies.mixing import alone, common_side, robots_of
from vlaflow.policies.objectives import PolicyObjective, RaterObjective
from vlaflow.policies.provenance import fingerprint, new_episodes, trained_on
from vlaflow.policies.recipe import Base, DataSpec, OpenedDataset
from vlaflow.policies.robots import robot_folder
from vlaflow.policies.vqa import VqaTraining
from vlaflow.serving.observation_keys import choose
from vlaflow.serving.server import PolicyServer, ServerConfig
from vlaflow.spec import ActionPrefix, Observation
from vlaflow.training import run
from vlaflow.training.loader import Loader
from vlaflow.training.metrics_log import read_log
from vlaflow.training.options import Options
from vlaflow.training.team import Team


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide") / "wide")


def trained(config, datasets, out, base=None, **options):
    return run.train_stage(config, datasets, out, name="mixed", base=base, options=Options(tracker="none", **options))


@pytest.fixture(scope="module")
def both(dataset, wide, tmp_path_factory):
    """A policy of both robots, with chunks of 0.4 s: four and eight actions."""
    out = tmp_path_factory.mktemp("both") / "policy"
    trained(mixed_config(chunk_s=0.4, max_excluded=1.0), [f"narrow={dataset}:0.7", f"{wide}:0.3"], out)
    return out


# -- the same as without ----------------------------------------------------------------------------------------------


def test_a_mixture_of_one_is_no_mixture(dataset, tmp_path):
    config = tiny_config(steps=2, validation_fraction=0.3)
    trained(config, str(dataset), tmp_path / "plain")
    trained(config, [f"other={dataset}:0.7"], tmp_path / "mixed")
    assert weights(tmp_path / "plain") == weights(tmp_path / "mixed")
    names = ("config.json", "stats.json", "action_spec.json")
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "mixed" / n).read_bytes() for n in names)


def test_a_cut_mixture_ends_with_the_same_bytes(both, dataset, wide, tmp_path, monkeypatch):
    batch, calls = Mixed.batch, []

    def cut(self, indices):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("cut")
        return batch(self, indices)

    monkeypatch.setattr(Mixed, "batch", cut)
    datasets = [f"narrow={dataset}:0.7", f"{wide}:0.3"]
    with pytest.raises(RuntimeError, match="cut"):
        trained(mixed_config(chunk_s=0.4, max_excluded=1.0), datasets, tmp_path / "p")
    monkeypatch.undo()
    trained(mixed_config(chunk_s=0.4, max_excluded=1.0), datasets, tmp_path / "p")
    assert weights(tmp_path / "p") == weights(both)


# -- what the other robot changes for the one that has everything: nothing --------------------------------------------


def full(batch):
    """The same samples as a policy of that robot alone gets them."""
    seen = replace(batch.observation, robot_B=None, shown=None)
    return replace(batch, observation=seen, mask_BLD=None, sources=())


@pytest.fixture(scope="module")
def mixed(dataset, wide):
    """An untrained policy of both robots, its samples, and a policy of the wide robot alone with the same weights."""
    config = mixed_config(max_excluded=1.0)
    datasets = [alone(Dataset.open(root)) for root in (dataset, wide)]
    setup = config.objective.set_up_several(config, datasets, config.objective.used_assets(run.Options().assets()))
    policy = setup.stage.policy
    one = robots_of(config.objective.policy, config, datasets[1:])
    assert list(one.by_name) == ["wide"]
    single = Policy.create(policy.config, WIDE, one.by_name["wide"].stats, 0)
    single.model.load_state_dict(policy.model.state_dict())
    return policy, setup.train, single


DECODERS = [FlowConfig(3, 4), FlowConfig(3, 4, padded_dim=5, masks="synchronous", max_action_prefix=2), RegressionConfig(3, 4)]


def rebuilt(policy, decoder):
    made = Policy.create(replace(policy.config, decoder=decoder), policy.action_spec, policy.stats, 0, robots=policy.robots)
    made.model.eval()
    return made


@pytest.mark.parametrize("decoder", DECODERS, ids=["unified", "committed", "regression"])
def test_padding_and_masks_change_nothing_for_the_robot_that_has_them_all(mixed, decoder):
    """Its loss is that of a policy of its own, alone in a batch and next to the other robot, up to rounding."""
    policy, source, single = (rebuilt(each, decoder) if isinstance(each, Policy) else each for each in mixed)
    first = len(source) - 8
    batch, generator = source.batch(np.arange(first, first + 4)), torch.Generator()
    apart = single.loss(single.prepare(full(batch)), generator.manual_seed(3), generator).total
    padded = policy.loss(policy.prepare(batch), generator.manual_seed(3), generator).total
    assert padded.item() == pytest.approx(apart.item(), rel=1e-5)
    neighbours = source.batch(np.array([0, 1, first, first + 1]))
    own = policy.embed(neighbours.observation).select(torch.tensor([2, 3]))
    there = single.embed(full(batch).observation).select(torch.tensor([0, 1]))
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    made = policy.model.decoder.sample(policy.model.read(own), noise, Sampling(3))
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    assert torch.allclose(made, single.model.decoder.sample(single.model.read(there), noise, Sampling(3)), atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS, ids=["unified", "committed", "regression"])
def test_what_a_robot_lacks_reaches_neither_its_loss_nor_its_chunks(mixed, decoder):
    """Numbers in padding, a picture where there is no camera, and weights of dimensions that it lacks."""
    policy, source = rebuilt(mixed[0], decoder), mixed[1]
    batch, generator = source.batch(np.arange(4)), torch.Generator()
    assert batch.mask_BLD.sum() == 4 * 4 * 2
    view = torch.full_like(batch.observation.images["wrist"], 200)
    state_BS = batch.observation.state_BS.clone()
    state_BS[:, 3] = 50.0
    action_BLD = batch.action_BLD.clone()
    action_BLD[..., 2] = 50.0
    seen = replace(batch.observation, images={**batch.observation.images, "wrist": view}, state_BS=state_BS)
    executed = replace(batch.executed, action_BLD=action_BLD)
    changed = replace(batch, observation=seen, action_BLD=action_BLD, executed=executed)

    def outcome(samples):
        policy.model.zero_grad()
        total = policy.loss(policy.prepare(samples), generator.manual_seed(3), generator).total
        total.backward()
        prefix = policy.model.read(policy.embed(samples.observation))
        with torch.no_grad():
            made = policy.model.decoder.sample(prefix, [torch.Generator().manual_seed(i) for i in range(4)], Sampling(3))
        return total.item(), made

    (loss, made), (other, again) = outcome(batch), outcome(changed)
    assert loss == other
    assert torch.equal(made, again)
    head = policy.model.decoder.codec.head[-1] if isinstance(decoder, FlowConfig) else None
    if head is not None:  # no sample has the third dimension, so its row learns nothing
        assert not head.weight.grad[2].any()
        assert head.weight.grad[:2].any()
        assert made[..., 2].abs().max() < 1e-5


def test_an_action_counts_the_same_whatever_its_number_of_dimensions(mixed):
    """The loss of a batch is the mean over its actions, so that weights mean what they say."""
    policy, source = rebuilt(mixed[0], RegressionConfig(3, 4)), mixed[1]
    index, generator = np.array([0, len(source) - 8]), torch.Generator()

    def loss(rows):
        return policy.loss(policy.prepare(source.batch(rows)), generator, generator).total.item()

    assert loss(index) == pytest.approx((loss(index[:1]) + loss(index[1:])) / 2, rel=1e-5)


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def observation(state, views):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return Observation(dict.fromkeys(views, image), np.full(state, 0.5, np.float32), "open")


def test_each_robot_gets_chunks_of_its_own(both, dataset, wide):
    """In its dimensions, its duration and its units, and with its own views."""
    narrow, broad = (Policy.from_pretrained(both, robot=name) for name in ("narrow", "wide arm"))
    assert (narrow.action_spec.robot, broad.robot) == ("test arm", "wide")
    chunk = narrow.act(observation(3, ["front"]))
    assert chunk.actions.shape == (4, 2)
    assert np.array_equal(chunk.actions, narrow.act(observation(3, ["front", "wrist"])).actions)
    assert broad.act(observation(4, ["front", "wrist"])).actions.shape == (8, 3)
    assert (narrow.n_action_steps, broad.n_action_steps) == (2, 4)
    measured = Dataset.open(wide).columns().state[np.isin(Dataset.open(wide).columns().episode, held(wide, 0))]
    assert broad.stats["state"].mean == pytest.approx(measured.mean(0), rel=1e-4)
    with pytest.raises(SpecError, match="view 'wrist'"):
        broad.act(observation(4, ["front"]))
    with pytest.raises(SpecError, match="state of length 4, got 3"):
        broad.act(observation(3, ["front", "wrist"]))
    folder = robot_folder(both, "wide arm")
    assert folder == both / "robots/wide"
    same = Policy.from_pretrained(folder)
    assert (same.robot, same.folder) == ("wide", folder)
    assert trained_on(folder) == trained_on(both)
    assert len({fingerprint(each) for each in (both, folder, both / "robots/narrow")}) == 3
    continued = ActionPrefix(np.full((3, 2), 0.1, np.float32), 2)
    assert np.array_equal(narrow.act(observation(3, ["front"]), action_prefix=continued).actions[:2], continued.actions[:2])
    with pytest.raises(SpecError, match="at most 3 committed actions of a chunk of 4, got 4"):
        narrow.act(observation(3, ["front"]), action_prefix=ActionPrefix(np.zeros((6, 2), np.float32), 4))


def held(root, part):
    return mixed_config().episodes(Dataset.open(root))[part]


def test_a_robot_must_be_chosen_by_a_name_that_there_is(both, dataset, tmp_path):
    with pytest.raises(
        ConfigError, match=r"several robots; choose one with --robot: 'narrow' \(test arm\), 'wide' \(wide arm\)"
    ):
        Policy.from_pretrained(both)
    with pytest.raises(ConfigError, match=r"no.* robot 'wid'; .*'wide'"):
        Policy.from_pretrained(both, robot="wid")
    with pytest.raises(ConfigError, match="choose one with --robot"):
        Policy.of_all_robots(both).act(observation(3, ["front"]))
    Policy.create(tiny_policy(), SPEC, Policy.of_all_robots(both).stats, 0).save_pretrained(tmp_path)
    for opening in (robot_folder, lambda path, robot: Policy.from_pretrained(path, robot=robot)):
        with pytest.raises(ConfigError, match="leave --robot narrow out"):
            opening(tmp_path, "narrow")


def test_a_robot_of_a_mixture_is_calibrated_and_checked(both, wide):
    """For itself: what is written lies in its folder, and the other robot has none of it."""
    folder = both / "robots/wide"
    arguments = ["--sampler", "--frames", "4", "--compute", "dense:1", "--compute", "dense:2", "--episodes", "all"]
    assert calibrate.main([str(both), "--robot", "wide", "--dataset", str(wide), *arguments]) == 0
    assert (folder / "calibration/sampler.json").exists()
    assert "dense:" in Policy.from_pretrained(both, robot="wide").default_compute.name
    assert Policy.from_pretrained(both, robot="narrow").default_compute == Dense()
    assert all(finding.passed for finding in check_policy(str(folder), "cpu", 2))


def test_one_of_several_robots_is_exported_alone(both, tmp_path):
    """Its chunks stay the same, in a checkpoint that knows no other robot and needs no choice."""
    with pytest.raises(ConfigError, match="choose one with --robot"):
        export(both, tmp_path / "none")
    assert export_command.main(["lerobot", str(both), "--robot", "narrow", "--out", str(tmp_path / "narrow")]) == 0
    export(both / "robots/wide", tmp_path / "wide")
    for name, seen in (("narrow", observation(3, ["front"])), ("wide", observation(4, ["front", "wrist"]))):
        alone = Policy.from_pretrained(tmp_path / name)
        assert list(alone.robots) == [path.name for path in (tmp_path / name / "vlaflow/robots").iterdir()] == [name]
        assert np.array_equal(alone.act(seen).actions, Policy.from_pretrained(both, robot=name).act(seen).actions)


def test_held_out_episodes_losses_and_records_are_kept_by_data_set(both, dataset, wide):
    for root in (dataset, wide):
        opened = Dataset.open(root)
        assert new_episodes(opened, trained_on(both)) == held(root, 1) != ()
    found = read_log(both)[-1]["validation"]
    assert found["loss"] == pytest.approx(0.7 * found["loss@narrow"] + 0.3 * found["loss@wide"])
    recorded = json.loads((both / "training/step-000004/state.json").read_text())["run"]["mixture"]
    assert [(each["name"], each["weight"]) for each in recorded] == [("narrow", 0.7), ("wide", 0.3)]
    card = (both / "README.md").read_text()
    assert "70 % of the samples, 6 episodes" in card
    assert "Robot: wide arm, 20 actions per second" in card


def test_a_mixture_is_continued_with_data_of_a_robot_that_it_knows(both, dataset, wide, tmp_path, capsys):
    """And no other weights or data sets are taken for the same run."""
    out = tmp_path / "further"
    options = Options({"steps": "1", "chunk_s": "none"}, "none")
    run.train("asyncvla.finetune", f"a={wide}", out, policy=both, options=options)
    assert list(Policy.of_all_robots(out).robots) == ["narrow", "wide"]
    before, after = (load_file(folder / "model.safetensors") for folder in (both, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="weight"):
        trained(mixed_config(chunk_s=0.4, max_excluded=1.0), [f"narrow={dataset}:0.5", f"{wide}:0.5"], both)


def test_chunks_of_a_policy_that_is_continued_keep_their_duration(both, wide, tmp_path):
    """0.4 s are four actions of one robot and eight of the other; any other duration is said to have no effect."""
    longer = Options({"steps": "1", "chunk_s": "0.8"}, "none")
    with pytest.raises(
        ConfigError, match=r"keep their 4 actions, 0\.4 s at 10 Hz\. Leave --chunk-seconds \(chunk_s=0\.8\) out"
    ):
        run.train("asyncvla.finetune", f"a={wide}", tmp_path / "out", policy=both, options=longer)
    policy = Policy.of_all_robots(both)
    rater = tiny_config(objective=RaterObjective(tiny_rater(policy.config)), steps=1, max_excluded=1.0, chunk_s=0.3)
    with pytest.raises(ConfigError, match="keep their 4 actions"):
        trained(rater, str(wide), tmp_path / "rated", base=Base.open(both))
    same = Options({"steps": "1", "chunk_s": "0.4"}, "none")
    run.train("asyncvla.finetune", f"a={wide}", tmp_path / "out", policy=both, options=same)


def test_a_rater_is_trained_for_all_robots_and_serves_one(both, dataset, wide, tmp_path):
    """With the labels of each robot's own dimensions and steps."""
    policy = Policy.of_all_robots(both)
    config = tiny_config(objective=RaterObjective(tiny_rater(policy.config)), steps=2, shift=0, max_excluded=1.0)
    trained(config, [f"narrow={dataset}", str(wide)], tmp_path / "rated", base=Base.open(both))
    rated = Policy.from_pretrained(tmp_path / "rated", robot="narrow")
    chunk = rated.act(observation(3, ["front"]), Refine(sampling=Sampling(2)))
    assert chunk.actions.shape == (4, 2)
    assert chunk.confidence.shape == (4,)
    server = PolicyServer(rated, Dense(), ServerConfig(**choose("metaworld", tuple(rated.views), (), ())))
    assert (server.n_action_steps, server.metadata["state_dim"], server.metadata["chunk_size"]) == (2, 3, 4)


def test_recipes_get_what_data_sets_have_together(dataset, wide):
    found = DataSpec.of(dataset, wide)
    assert (found.state_dim, found.action_dim, found.views) == (4, 3, ("front", "wrist"))


# -- other stages and decoders ----------------------------------------------------------------------------------------


def test_a_latent_action_model_learns_from_data_sets_of_other_rates_views_and_actions(dataset, wide, tmp_path, capsys):
    """Every pair has one action, the mean over its gap, so that pairs of a higher rate do not count more."""
    config = latent_config(model=replace(SMALL, action_dim=3), steps=2, validation_fraction=0.3)
    config = replace(config, objective=replace(config.objective, view="wrist"))
    trained(config, [f"{wide}:0.5", f"narrow={dataset}:0.5"], tmp_path / "latent")
    assert "narrow: there is no view 'wrist'; 'front' is used" in capsys.readouterr().err
    found = read_log(tmp_path / "latent")[-1]["validation"]
    assert found["loss"] == pytest.approx((found["loss@wide"] + found["loss@narrow"]) / 2)
    origin = LatentActionModel.from_pretrained(tmp_path / "latent").origin
    assert [origin.dataset, *origin.others] == [Dataset.open(root).fingerprint for root in (wide, dataset)]
    opened = [OpenedDataset(DatasetEntry(str(r), r.name), Dataset.open(r), r.name) for r in (dataset, wide)]
    samples, pairs = pairs_of(Paired("front", 0.2, 32), config, opened)
    batch = samples.train.batch(np.array([3, len(pairs)]))
    assert batch.targets == 2
    assert torch.allclose(batch.action_BLD[0, 0, :2], pairs.batch(np.array([3])).action_BLD[0].mean(0))
    assert batch.mask_BLD.sum((1, 2)).tolist() == [2, 3]


@pytest.mark.parametrize(
    "decoder", [DiscreteFlowConfig(3, BinsFit(8), 4, metric=BinMetric()), AutoregressiveConfig(3, FastFit(), 4)]
)
def test_tokens_describe_what_a_robot_lacks(dataset, wide, decoder, tmp_path):
    """Chunks of the shorter and narrower robot end with its last action, and are 0 in the third dimension."""
    config = mixed_config(decoder, max_excluded=1.0, chunk_s=0.3)
    datasets = [alone(Dataset.open(root)) for root in (dataset, wide)]
    setup = config.objective.set_up_several(config, datasets, Options().assets())
    policy, batch = setup.stage.policy, setup.train.batch(np.arange(2))
    targets = policy.targets(batch)
    id_BS, weight_BS = policy.model.decoder.encode(targets)
    assert weight_BS.all()
    decoded = torch.from_numpy(policy.model.decoder.tokenizer.decode(id_BS.numpy()).action_BLD)
    assert decoded.shape == (2, 6, 3)
    assert torch.allclose(decoded, targets.action_BLD, atol=0.3)
    assert policy.loss(policy.prepare(batch), torch.Generator(), torch.Generator()).total.isfinite()


def test_questions_are_learned_next_to_a_mixture(dataset, wide, tmp_path):
    config = mixed_config(max_excluded=1.0)
    policy = replace(config.objective.policy, backbone=replace(config.objective.policy.backbone, answers=True))
    config = replace(config, objective=PolicyObjective(policy, VqaTraining(0.5)), steps=2)
    questions = write_questions(tmp_path / "questions")
    trained(config, [str(dataset), str(wide)], tmp_path / "p", vqa=questions)
    log = read_log(tmp_path / "p")
    assert ["answer_loss" in entry for entry in log] == [False, True]
    assert {"loss@dataset", "loss@wide", "answer"} <= log[-1]["validation"].keys()


@pytest.mark.parametrize("world", [2, 4])
def test_a_mixed_step_is_the_same_on_any_number_of_processes(mixed, world):
    config, source = mixed_config(global_batch_size=8, accumulate=4), mixed[1]

    def parts(team):
        return Loader(source, config, team, torch.device("cpu"), as_it_is, order=source.order).step(2)

    together = [part for rank in range(world) for part in parts(Team(rank, world))]
    for one, other in zip(parts(Team()), together, strict=True):
        assert torch.equal(one.batch.action_BLD, other.batch.action_BLD)
        assert list(one.batch.sources) == list(other.batch.sources)
        assert one.drawn.numbers == other.drawn.numbers


def test_filters_speak_by_data_set(dataset, wide, tmp_path, capsys):
    trained(mixed_config(max_excluded=1.0, filters=Filters(slow=0.8, slow_s=0.1)), [str(dataset), str(wide)], tmp_path / "p")
    said = capsys.readouterr().err
    for name in ("dataset", "wide"):
        assert re.search(rf"^{name}: .* of the frames begin no chunk \(.*in slow segments\)", said, re.MULTILINE)


def test_images_of_unequal_size_are_brought_to_one_that_is_kept(dataset, wide, tmp_path):
    """Only where several data sets are mixed, and a backbone would take any size."""
    opened = [alone(Dataset.open(root)) for root in (dataset, wide)]
    policy = mixed_config().objective.policy
    assert common_side(policy, [each.dataset for each in opened]) is None
    views = {"front": (32, 48), "wrist": (16, 16)}
    with Writer(
        tmp_path, fps=20, action_spec=WIDE, state_names=tuple("abcg"), views=views, robot_type="w", provenance={}
    ) as out:
        images = {view: np.zeros((5, *size, 3), np.uint8) for view, size in views.items()}
        out.add(images, np.zeros((5, 4), np.float32), np.zeros((5, 3), np.float32), "lift")
    unequal = Dataset.open(tmp_path)
    assert common_side(policy, [unequal]) is None
    assert common_side(policy, [opened[0].dataset, unequal]) == 48
