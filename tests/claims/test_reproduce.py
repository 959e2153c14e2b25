"""The catalogue, the commands that it becomes, and ``vlaflow reproduce`` from a claim to its row."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.evaluation.conftest import make_policy
from vlaflow.claims.benchmark import BENCHMARKS, METAWORLD
from vlaflow.claims.catalogue import CLAIMS
from vlaflow.claims.plan import Places, Size, commands
from vlaflow.claims.row import read
from vlaflow.cli import reproduce
from vlaflow.cli.main import main
from vlaflow.compute.parse import parse
from vlaflow.compute.spelling import Checkpoint
from vlaflow.config import override
from vlaflow.errors import ConfigError
from vlaflow.evaluation import results
from vlaflow.evaluation.latency import Latency
from vlaflow.evaluation.results import Minutes, Results
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.evaluation.statistics import Percentiles
from vlaflow.policies.recipe import DataSpec
from vlaflow.training.recipes import find_recipe

C2 = CLAIMS["C2"]


def test_all_fourteen_claims_are_there():
    assert list(CLAIMS) == [f"C{n}" for n in range(1, 15)]


def test_the_page_of_the_documentation_lists_them():
    page = (Path(__file__).parents[2] / "docs/claims.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| C")}
    assert list(rows) == list(CLAIMS)
    for claim in CLAIMS.values():
        assert claim.statement.removesuffix(".") in rows[claim.name]
        assert claim.published in rows[claim.name]
        assert f"| {METAWORLD.hours_of(claim):.1f} |" in rows[claim.name]


def test_claims_that_share_a_training_agree_on_it():
    known = {}
    for claim in CLAIMS.values():
        for name, training in claim.trainings.items():
            assert known.setdefault(name, training) == training


def _computes():
    return sorted({arm.compute for claim in CLAIMS.values() for arm in claim.arms.values() if arm.compute})


MEASURED = re.compile(r"(.*\+)?auto|exit:.*|refine:[a-z].*")
"""Compute policies that read what was measured of a checkpoint."""


@pytest.mark.parametrize("name", [c for c in _computes() if not MEASURED.fullmatch(c)])
def test_compute_policies_of_the_arms_exist(name):
    assert parse(name).name


def test_exits_of_the_arms_are_calibrated_first():
    for claim in CLAIMS.values():
        for arm in claim.arms.values():
            if arm.compute and re.match("exit:|refine:[a-z]", arm.compute):
                assert arm.compute.partition(":")[2] in claim.trainings[arm.training].calibrations
            if arm.compute and arm.compute.endswith("auto"):
                assert claim.trainings[arm.training].sampler


TESTS = [(name, one) for one in ("metaworld", "libero/goal") for name in CLAIMS if not BENCHMARKS[one].lacks(CLAIMS[name])]


@pytest.mark.parametrize(("name", "benchmark"), TESTS)
def test_settings_of_the_trainings_are_values_of_their_recipes(name, benchmark):
    made = {}
    for known in CLAIMS[name].order():
        training = BENCHMARKS[benchmark].training(CLAIMS[name].trainings[known])
        recipe = find_recipe(training.recipe)
        assert recipe.continues == (training.after is not None)
        before = made[training.after] if training.after else None
        settings = {key: value for key, value in training.settings.items() if not (training.vqa and key.startswith("vqa."))}
        config = override(recipe.config(DataSpec(4, 4, ("front",)), before), settings)
        made[known] = getattr(config.objective, "policy", None)


def test_trainings_come_after_those_they_continue_and_before_their_evaluation(tmp_path):
    for claim in CLAIMS.values():
        everything = list(commands(claim, Places(tmp_path, Size(training_seeds=2))))
        made = []
        for words in everything:
            given = dict(pairwise(words))
            for option in ("--policy", "--latent", "--dataset", "--vqa"):
                assert option not in given or given[option] in made
            if words[0] in ("eval", "eval-vqa", "calibrate"):
                assert words[1] in made
            if "--out" in given:
                made.append(given["--out"])
        assert len(made) == len(set(made))


def test_on_libero_a_training_takes_its_recipe_there_and_the_same_share_of_its_steps(tmp_path):
    places = Places(tmp_path, Size(training_seeds=1, episodes=10), BENCHMARKS["libero/goal"])
    record, *others = commands(CLAIMS["C3"], places)
    assert record[:3] == ["record", "--env", "libero/goal/0"]
    assert record[record.index("--noise-memory") + 1] == "0"
    trained = [(words[1], dict(pairwise(words))["--steps"]) for words in others if words[0] == "train"]
    assert trained == [("asyncvla.libero_small", steps) for steps in ("4000", "4000", "1500", "1500")]
    assert all(f"{tmp_path}/libero-goal/" in word for words in others for word in words if str(tmp_path) in word)
    steps = find_recipe("asyncvla.libero_small").config(DataSpec(8, 7, ("image", "wrist_image"))).steps
    assert steps == 4000, "the full training is the recipe's own"


def test_claims_without_recipes_or_questions_on_a_benchmark_are_refused_and_not_listed(tmp_path, monkeypatch, capsys):
    stage = Stage(monkeypatch, {})
    given = ["--benchmark", "libero/goal", "--out", str(tmp_path)]
    assert main(["reproduce", "C2", "C9", *given]) == 2
    said = capsys.readouterr().err
    assert "C9 trains baselines.masked_diffusion, which has no counterpart for libero/goal. Leave --benchmark out" in said
    assert not stage.ran
    assert main(["reproduce", "--list", *given]) == 0
    listed = re.findall(r"^ *(C\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C13"]
    with pytest.raises(ConfigError, match="C14 asks questions about scenes, of which libero/goal has none"):
        replace(BENCHMARKS["libero/goal"], recipes={}).require(CLAIMS["C14"])


def test_benchmarks_lie_side_by_side(tmp_path, monkeypatch, capsys):
    stage = Stage(monkeypatch, {"dense:2": 9, "refine-random:2": 1})
    words = ["reproduce", "C2", "--out", str(tmp_path), "--training-seeds", "1"]
    assert main([*words, "--episodes", "12"]) == 0
    assert main([*words, "--benchmark", "libero/goal"]) == 0
    assert stage.ran == ["record", "train", "eval"] * 2
    elsewhere = Places(tmp_path, benchmark=BENCHMARKS["libero/goal"])
    assert [read(C2, places).benchmark for places in (Places(tmp_path), elsewhere)] == ["metaworld", "libero/goal"]
    assert [arm.n for arm in read(C2, elsewhere).arms] == [100, 100], "ten tasks with ten seeds"
    elsewhere.row(C2).write_text(json.dumps({"format": "vlaflow claim 0"}))
    capsys.readouterr()
    assert main(["reproduce", "--list", "--out", str(tmp_path), "--benchmark", "libero/goal"]) == 2
    assert f"vlaflow reproduce C2 --benchmark libero/goal --out {tmp_path}" in capsys.readouterr().err


def test_a_size_that_cannot_be_is_refused(capsys):
    with pytest.raises(ConfigError, match="episodes must be at least 1, got 0"):
        Size(episodes=0)
    assert main(["reproduce", "C2", "--training-seeds", "0"]) == 2
    assert "--training-seeds must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"), [([], "Name at least one claim"), (["C22"], "There is no claim 'C22'; did you mean 'C2'")]
)
def test_a_claim_must_be_named(words, said, capsys):
    assert main(["reproduce", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["reproduce", "C2", "--out", str(tmp_path)]) == 2
    assert "is not empty and contains no test of claims" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


class Stage:
    """Stands in for the commands: a training leaves an untrained checkpoint, an evaluation the successes it was given."""

    def __init__(self, monkeypatch, successes):
        self.successes, self.ran, self.unfinished = successes, [], None
        self.machine, self.versions = "A processor", {"torch": "2.13.0"}
        monkeypatch.setattr(reproduce, "_run", self.run)

    def run(self, words):
        if words[0] == self.unfinished:
            return 130
        self.ran.append(words[0] + (" --fresh" if "--fresh" in words else ""))
        out = words[words.index("--out") + 1]
        if words[0] == "record":
            Path(out).mkdir(parents=True)
        elif words[0] == "train":
            make_policy(rater=False).save_pretrained(out)
        elif words[0] == "eval":
            self.evaluate(words, out)
        return None

    def evaluate(self, words, out):
        envs = [word for before, word in pairwise(words) if before == "--env"]
        names = [word for before, word in pairwise(words) if before == "--compute"]
        names = [parse(name, checkpoint=Checkpoint(out, "")).name for name in names]
        number = int(words[words.index("--episodes") + 1])
        episodes = [
            EpisodeResult(env, name, 1000 + n, "do it", n < self.successes[name], None, 5, 1, 2, 12, 0)
            for env in envs
            for name in names
            for n in range(number)
        ]
        times = Percentiles(*[5.0] * len(Percentiles.__dataclass_fields__))
        latency = [Latency(name, 1, times, {}, {}, 5.0, 12.0, 2.0, 0.0) for name in names]
        found = results.count(episodes, latency, n_action_steps=8, max_steps=24, render="fast", solver_steps=10)
        file = Results(found, Minutes(), self.versions, "", "", "", self.machine, results.pool(found), (), ())
        results.write(file, reproduce.Path(out) / "results.json")


def test_from_a_claim_to_its_row_and_page(tmp_path, monkeypatch, capsys):
    stage = Stage(monkeypatch, {"dense:2": 10, "refine-random:2": 2})
    words = ["reproduce", "C2", "--out", str(tmp_path), "--training-seeds", "2", "--episodes", "12"]
    stage.unfinished = "eval"
    assert main(words) == 130
    assert stage.ran == ["record", "train", "train"]
    stage.unfinished = None
    assert main(words) == 0
    assert stage.ran == ["record", "train", "train", "eval", "eval"], "finished steps are not repeated"
    printed = capsys.readouterr().out
    assert "C2: held" in printed
    assert "synchronous: more successes than regenerated: +66.7 points" in printed
    row = read(C2, Places(tmp_path))
    assert row.verdict == "held"
    assert [(arm.arm, arm.successes, arm.n) for arm in row.arms] == [("synchronous", 60, 72), ("regenerated", 12, 72)]
    assert row.findings[0].per_seed == pytest.approx((2 / 3, 2 / 3))
    assert [shlex.split(text)[1] for text in row.commands] == stage.ran
    assert "collapses" in (tmp_path / "C2.html").read_text()
    assert main(words) == 0
    assert len(stage.ran) == 5
    capsys.readouterr()
    assert main(["reproduce", "--list", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("held") == 1


def test_fresh_starts_the_interrupted_step_over_and_keeps_the_finished_ones(tmp_path, monkeypatch):
    """What another version of a package began cannot be continued; the trainings before it can still be used."""
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--out", str(tmp_path), "--training-seeds", "2", "--episodes", "6"]
    stage.unfinished = "eval"
    assert main(words) == 130
    stage.unfinished = None
    assert main([*words, "--fresh"]) == 0
    assert stage.ran == ["record", "train", "train", "eval --fresh", "eval"]
    assert not any("--fresh" in text for text in read(C2, Places(tmp_path)).commands)
    assert main([*words, "--fresh"]) == 0
    assert len(stage.ran) == 5


def test_claims_share_recordings_and_trainings(tmp_path, monkeypatch):
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    one = ["--out", str(tmp_path), "--training-seeds", "1", "--episodes", "6"]
    monkeypatch.setitem(CLAIMS, "C3", replace(C2, name="C3"))
    assert main(["reproduce", "C2", "C3", *one]) == 0
    assert stage.ran == ["record", "train", "eval", "eval"]


def test_the_number_of_workers_repeats_nothing(tmp_path, monkeypatch, capsys):
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--out", str(tmp_path), "--training-seeds", "1", "--episodes", "6"]
    assert main([*words, "--workers", "2"]) == 0
    assert main([*words, "--workers", "1"]) == 0
    assert stage.ran == ["record", "train", "eval"]
    assert "--workers 1   (done before)" in capsys.readouterr().out


def test_a_folder_that_was_moved_or_is_named_in_another_way_is_continued(tmp_path, monkeypatch):
    """Steps that are recorded by the folder's name, as they once were, count too."""
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--training-seeds", "1", "--episodes", "6", "--out"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "here"]) == 0
    assert main([*words, str(tmp_path / "here")]) == 0
    Path("here").rename("there")
    assert main([*words, "there"]) == 0
    assert stage.ran == ["record", "train", "eval"]
    file = Path("there/steps.json")
    known = {
        text.replace("policies/", "there/policies/").replace("results/", "there/results/"): 1.0
        for text in json.loads(file.read_text())
    }
    file.write_text(json.dumps({text.replace(" dataset-", " there/dataset-"): seconds for text, seconds in known.items()}))
    assert main([*words, "there"]) == 0
    assert stage.ran == ["record", "train", "eval"]


def test_what_was_removed_is_made_again_and_what_was_made_of_a_checkpoint(tmp_path, monkeypatch):
    """An evaluation of a policy that is no more says nothing about the next one."""
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--training-seeds", "2", "--episodes", "6", "--out", str(tmp_path)]
    assert main(words) == 0
    places = Places(tmp_path, Size(2, episodes=6))
    shutil.rmtree(places.results(C2, "synchronous", 1))
    assert main(words) == 0
    assert stage.ran[5:] == ["eval"]
    shutil.rmtree(places.policy("synchronous", 0))
    assert main(words) == 0
    assert stage.ran[6:] == ["train", "eval"]
    shutil.rmtree(places.dataset)
    assert main(words) == 0
    assert stage.ran[8:] == ["record"], "which is the same every time"


def test_a_row_says_where_and_with_what_its_arms_were_measured(tmp_path, monkeypatch):
    """Which need not be the machine, nor the versions, that concludes."""
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--training-seeds", "1", "--episodes", "6", "--out", str(tmp_path)]
    assert main(words) == 0
    row = read(C2, Places(tmp_path))
    assert (row.machine, row.versions) == ("A processor", {"torch": "2.13.0"})
    stage.machine, stage.versions = "Another", {"torch": "2.14.0", "mujoco": "3.3.0"}
    assert main([*words, "--training-seeds", "2"]) == 0
    row = read(C2, Places(tmp_path))
    assert row.machine == "A processor and Another"
    assert row.versions == {"torch": "2.13.0 and 2.14.0", "mujoco": "3.3.0"}


def test_a_quick_test_says_that_it_says_nothing(tmp_path, monkeypatch, capsys):
    Stage(monkeypatch, {"dense:2": 2, "refine-random:2": 0})
    assert main(["reproduce", "C2", "--out", str(tmp_path), "--quick"]) == 0
    assert re.search(r"^C2: [a-z ]+ \(--quick says nothing about the claim\)$", capsys.readouterr().out, re.MULTILINE)


def test_every_size_has_its_own_recordings_trainings_and_results(tmp_path, monkeypatch):
    stage = Stage(monkeypatch, {"dense:2": 5, "refine-random:2": 5})
    words = ["reproduce", "C2", "--out", str(tmp_path), "--training-seeds", "1", "--episodes", "6"]
    assert main([*words, "--demonstrations", "50"]) == 0
    assert main([*words, "--demonstrations", "10"]) == 0
    assert stage.ran == ["record", "train", "eval"] * 2
    assert main([*words, "--demonstrations", "10", "--episodes", "8"]) == 0
    assert [arm.n for arm in read(C2, Places(tmp_path)).arms] == [24, 24]
    assert main([*words, "--demonstrations", "10"]) == 0
    assert [arm.n for arm in read(C2, Places(tmp_path)).arms] == [18, 18]
    assert stage.ran == ["record", "train", "eval"] * 2 + ["eval"], "the answers of six seeds are still there"


def test_a_training_that_a_signal_ended_is_not_done(monkeypatch):
    from vlaflow.cli import train

    for signal, finished, status in ((15, False, 0), (2, False, 130), (None, True, None), (15, True, None)):
        outcome = SimpleNamespace(signal=signal, finished=finished)
        monkeypatch.setattr(train, "run", lambda words, outcome=outcome: outcome)
        assert reproduce._run(["train", "asyncvla.demo"]) == status


def test_a_damaged_record_of_steps_is_one_sentence(tmp_path, capsys):
    for content, wrong in (
        (["vlaflow record"], "steps.json contains a list instead of an object"),
        ({"vlaflow record 'x": 1.0}, "steps.json holds what is no command (No closing quotation)"),
    ):
        (tmp_path / "steps.json").write_text(json.dumps(content))
        assert main(["reproduce", "C2", "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert wrong in said
        assert said.count("\n") == 1
