"""Verdicts on outcomes whose answer is known."""

from dataclasses import replace

import pytest

from vlaflow.claims.base import Claim, Effect, Training, TrialArm
from vlaflow.claims.verdict import Measured, arm_row, findings, holm, overall
from vlaflow.errors import ConfigError, DataError

TWO = {"a": TrialArm("one", "dense"), "b": TrialArm("one", "refine"), "c": TrialArm("one", "mean:2")}


def claim(*effects):
    return Claim("X", "System", "says.", "figures", {"one": Training("asyncvla.demo")}, TWO, effects, ("suite/task",))


def outcomes(*by_seed):
    """A training seed per string; one letter per environment seed."""
    return {(seed, f"task {n}"): (letter == "+",) for seed, text in enumerate(by_seed) for n, letter in enumerate(text)}


def judged(effect, first, second):
    (found,) = findings(claim(effect), {effect.first: first, effect.second: second})
    return found


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (["+" * 10, "+" * 10], ["-" * 10, "-" * 10], "held"),
        (["-" * 10, "-" * 10], ["+" * 10, "+" * 10], "refuted"),
        (["+" * 10, "-" * 10], ["-" * 10, "+" * 10], "not seen"),
        (["+" * 5, "+" * 5], ["+" * 5, "+" * 5], "not seen"),
        (["++"], ["--"], "not seen"),
        (["+" * 20, "+++-"], ["-" * 20, "++++"], "not seen"),  # significant over all, of another sign in one training
    ],
)
def test_more_successes(first, second, verdict):
    found = judged(Effect("a", "b"), Measured(outcomes(*first)), Measured(outcomes(*second)))
    assert found.verdict == verdict
    assert overall([found]) == verdict


def test_no_fewer_needs_enough_pairs_to_exclude_the_margin():
    few, many = (Measured(outcomes("+" * n)) for n in (10, 400))
    worse = Measured(outcomes("-" * 100 + "+" * 300))
    effect = Effect("a", "b", "no fewer", margin=0.05)
    assert judged(effect, few, few).verdict == "not seen"
    assert judged(effect, many, many).verdict == "held"
    assert judged(effect, worse, many).verdict == "refuted"
    assert judged(replace(effect, margin=0.5), worse, many).verdict == "held"


@pytest.mark.parametrize(("cost", "verdict"), [(0.5, "held"), (1.0, "not seen"), (2.0, "refuted")])
@pytest.mark.parametrize("what", ["latency", "layer passes"])
def test_cheaper(cost, verdict, what):
    plain = Measured(outcomes("+-"), 10.0, 10.0)
    value = {"latency": {"latency_ms": 10 * cost}, "layer passes": {"layer_passes": 10 * cost}}[what]
    found = judged(Effect("a", "b", "cheaper", cost=what), replace(plain, **value), plain)
    assert (found.ratio, found.verdict) == (pytest.approx(cost), verdict)


def test_a_cost_that_was_not_measured_is_refused():
    with pytest.raises(DataError, match="latency of 'a' or 'b' was not measured"):
        judged(Effect("a", "b", "cheaper"), Measured(outcomes("+")), Measured(outcomes("+")))


def test_several_effects_are_corrected_together():
    """Seven discordant pairs of one sign: p = 2/2⁷ = 0.0156, which one effect shows and four do not."""
    better, worse = Measured(outcomes("+" * 7)), Measured(outcomes("-" * 7))
    measured = {"a": better, "b": worse, "c": worse}
    (alone,) = findings(claim(Effect("a", "b")), measured)
    assert (alone.p_value, alone.adjusted, alone.verdict) == (pytest.approx(2 / 128), pytest.approx(2 / 128), "held")
    found = findings(claim(*[Effect("a", "b")] * 4), measured)
    assert [f.verdict for f in found] == ["not seen"] * 4


def test_holm_is_the_step_down_of_the_sorted_p_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_refuted_effect_refutes_the_claim_and_one_open_one_leaves_it_open():
    better, worse = Measured(outcomes("+" * 12)), Measured(outcomes("-" * 12))
    measured = {"a": better, "b": worse, "c": better}
    assert overall(findings(claim(Effect("a", "b"), Effect("b", "c")), measured)) == "refuted"
    assert overall(findings(claim(Effect("a", "b"), Effect("a", "c")), measured)) == "not seen"


def test_repeated_noise_seeds_are_not_independent_pairs():
    """Twelve episodes of three scenes that never differ within a scene are worth three pairs."""
    first, second = ({(0, f"task {n}"): (won,) * 4 for n in range(3)} for won in (True, False))
    found = judged(Effect("a", "b"), Measured(first), Measured(second))
    assert (found.difference, found.p_value, found.verdict) == (1.0, 0.25, "not seen")
    assert arm_row("a", Measured(first)).n == 12
    assert arm_row("a", Measured(first)).interval[0] == pytest.approx(arm_row("a", Measured(outcomes("+++"))).interval[0])


def test_questions_of_one_group_are_a_cluster_of_any_size():
    """Nine answers of two episodes differ; as nine independent ones they would be significant."""
    right = {(0, "a"): (True,) * 6, (0, "b"): (True,) * 3}
    wrong = {key: tuple(not each for each in values) for key, values in right.items()}
    found = judged(Effect("a", "b"), Measured(right), Measured(wrong))
    assert (found.difference, found.per_seed) == (1.0, (1.0,))
    assert found.p_value == 0.5
    assert found.verdict == "not seen"


def test_arms_on_other_seeds_are_not_paired():
    with pytest.raises(DataError, match="were not measured on the same seeds"):
        judged(Effect("a", "b"), Measured(outcomes("++")), Measured(outcomes("+++")))


def test_a_claim_names_what_it_compares():
    with pytest.raises(ConfigError, match="compares 'd', which is not among its arms"):
        claim(Effect("a", "d"))
    with pytest.raises(ConfigError, match="unknown training 'two'"):
        replace(claim(), arms={"a": TrialArm("two", "dense")})
    with pytest.raises(ConfigError, match="needs 'two', which is not among its trainings"):
        replace(claim(), trainings={"one": Training("asyncvla.rater", after="two")})
