"""Numbers outside their range are refused before anything else, on the command line, in files and in Python."""

import importlib
import math
import typing
from dataclasses import dataclass, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import BINS, policy_config
from vlaflow.cli.main import COMMANDS as COMMAND_NAMES
from vlaflow.cli.main import main
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.early_exit import ExitPlan
from vlaflow.config import from_json, override
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.token_metrics import EmbeddingMetric
from vlaflow.errors import ConfigError
from vlaflow.evaluation.rollout import RolloutConfig
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.adapters import LoraConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.policy_config import Normalisation
from vlaflow.policies.recipe import OptimConfig, ParameterGroup, TrainConfig
from vlaflow.ranges import Count, Fraction, NotNegative, Positive, Share, _ranges, require_ranges, require_words
from vlaflow.simulators.experts import Noise
from vlaflow.stacks.expert import ExpertConfig


@dataclass(frozen=True)
class Numbers:
    count: Count = 1
    optional: Count | None = None
    several: tuple[NotNegative, ...] = ()
    positive: Positive = 1.0
    share: Share = 1.0
    fraction: Fraction = 0.0


def test_what_lies_within_its_range_is_accepted():
    require_ranges(Numbers(5, 7, (0.0, 3.5), 1e-9, 0.5, math.nextafter(1, 0)))


@given(st.sampled_from(["count", "optional", "positive"]), st.floats(max_value=0))
def test_what_is_not_above_zero_is_refused_where_that_is_wanted(name, value):
    with pytest.raises(ConfigError, match=f"^--{name} must be "):
        require_ranges(Numbers(**{name: value}), "--{}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", ["positive", "share", "fraction", "several"])
def test_what_is_not_finite_is_in_no_range(name, value):
    with pytest.raises(ConfigError, match=name):
        require_ranges(Numbers(**{name: (1.0, value) if name == "several" else value}))


def test_ends_belong_to_a_range_as_it_says():
    for wrong in ({"share": 1.1}, {"fraction": 1.0}, {"positive": 0.0}, {"count": 2**40}):
        with pytest.raises(ConfigError, match=r"must be .*, got"):
            require_ranges(Numbers(**wrong))


MISSPELT = {
    "solver": lambda: Sampling(2, solver="eular"),
    "choose": lambda: Consensus(2, "median"),
    "metric": lambda: ExitPlan((1, 2), "maxabs"),
    "warm_start": lambda: ExitPlan((1, 2), warm_start="anchored"),
    "masks": lambda: policy_config(masks="Unified"),
    "action_normalisation": lambda: replace(policy_config(), action_normalisation="minmax"),
    "norm": lambda: policy_config(expert=ExpertConfig(BlockConfig(32, 2, 2, 16, 64, norm="RMS"))),
    "table": lambda: replace(policy_config(), decoder=DiscreteFlowConfig(4, BINS, 6, metric=EmbeddingMetric("freezed"))),
    "power": lambda: replace(policy_config(), decoder=DiscreteFlowConfig(4, BINS, 6, metric=EmbeddingMetric(power=3))),
    "precision": lambda: TrainConfig(PolicyObjective(policy_config()), precision="float32"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_word_is_refused_where_it_is_said(name):
    """It meant whatever the last of several branches does, and no checkpoint with it could be opened again."""
    with pytest.raises(ConfigError, match=rf"^'{name}' of \w+ is .*; (did you mean|valid names)"):
        MISSPELT[name]()


def test_words_are_checked_beside_numbers_and_nothing():
    """Of ``Mode | Same``, ``float | "same" | None`` and free text only the first two know words of their own."""
    Normalisation("quantile", "same", "same", 1.5, ("gripper",))
    Normalisation(state_clip=None, kept_actions="same")
    for wrong in ({"state_normalisation": "min-max"}, {"action_clip": "save"}):
        with pytest.raises(ConfigError, match="did you mean"):
            require_words(Normalisation(**wrong))


def test_files_and_changed_values_are_checked_like_arguments():
    with pytest.raises(ConfigError, match=r"'config.count' in file.json must be at least 1, got 0"):
        from_json(Numbers, {"count": 0}, "file.json")
    with pytest.raises(ConfigError, match=r"'fraction' in --set must be in \[0, 1\), got 2.0"):
        override(Numbers(), {"fraction": "2"})
    with pytest.raises(ConfigError, match=r"'several\[0\]' in --set must be at least 0, got nan"):
        override(Numbers(), {"several": "[NaN]"})
    for make in (lambda: Noise(0.1, misjudge=math.nan), lambda: Noise(memory=1.0), lambda: RolloutConfig(n_action_steps=0)):
        with pytest.raises(ConfigError, match="must be"):
            make()
    with pytest.raises(ConfigError, match=r"optim\.betas must be in \[0, 1\), got 1\.0"):
        OptimConfig(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match=r"optim\.groups\.frozen_steps must be at least 0, got -1"):
        ParameterGroup("decoder.", frozen_steps=-1)
    with pytest.raises(ConfigError, match=r"lora\.learning_rate must be at least 0, got -1\.0"):
        LoraConfig(learning_rate=-1.0)


TRAIN = "train asyncvla.demo --dataset nowhere --out nowhere"
COMMANDS = [
    ("record --env metaworld/drawer-open-v3 --out nowhere --misjudge nan", "--misjudge must be at least 0, got nan"),
    ("record --env metaworld/drawer-open-v3 --out nowhere --seed -1", "--seed must be"),
    ("record-vqa --env metaworld/drawer-open-v3 --out nowhere --noise inf", "--noise must be"),
    ("eval nowhere --env metaworld/drawer-open-v3 --n-action-steps 0", "--n-action-steps must be at least 1, got 0"),
    ("eval nowhere --env metaworld/drawer-open-v3 --device foo", "--device foo cannot be used on this machine"),
    ("eval-realtime --env metaworld/drawer-open-v3 --delay-ms nan", "--delay-ms must be at least 0, got nan"),
    ("eval-vqa nowhere --vqa nowhere --batch-size 0", "--batch-size must be"),
    ("serve nowhere --threads 0", "--threads must be"),
    ("serve nowhere --deadline-ms nan", "--deadline-ms must be above 0, got nan"),
    ("serve nowhere --port 99999", "--port must be in 0..65535"),
    ("calibrate nowhere --dataset nowhere --confidence 2", "--confidence must be in 0..1, got 2.0"),
    ("deploy nowhere --threads 0", "--threads must be"),
    ("deploy nowhere --batch 0", "--batch must be"),
    ("demo --out nowhere --eval-episodes 0", "--eval-episodes must be"),
    ("bench latency nowhere --rounds 0", "--rounds must be"),
    ("data show nowhere --episodes -3", "--episodes must be"),
    (f"{TRAIN} --steps 0", "--steps must be"),
]


@pytest.mark.parametrize(("words", "sentence"), COMMANDS, ids=[words.split()[0] + words.split()[-2] for words, _ in COMMANDS])
def test_every_command_refuses_at_the_start_in_one_sentence(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def numeric(annotation):
    """Whether a number is anywhere in it."""
    return annotation in (int, float) or any(map(numeric, typing.get_args(annotation)))


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_every_numeric_option_states_its_range(command):
    module = importlib.import_module(f"vlaflow.cli.{command.replace('-', '_')}")
    for kind in vars(module).values():
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__ and kind.__name__ != "Settings":
            hints = typing.get_type_hints(kind, include_extras=True)
            assert [name for name, hint in hints.items() if numeric(hint) and not _ranges(hint)] == [], kind
