"""results.json comes back as it was written, and the counting in it is right."""

import json
from dataclasses import replace

import pytest

from tests.reports import synthetic
from vlaflow.errors import ConfigError, DataError
from vlaflow.evaluation import language, results
from vlaflow.evaluation.statistics import PairedOutcomes, mcnemar, paired_difference, wilson


def test_the_file_comes_back_equal(tmp_path):
    written = synthetic.results()
    results.write(written, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == written
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]


def test_the_file_has_the_promised_keys(tmp_path):
    results.write(synthetic.results(), tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert {"evaluations", "minutes", "versions", "command"} <= data.keys()
    assert data["minutes"].keys() == {"install", "record", "train", "rater", "calibrate", "evaluate", "total"}
    entry = data["evaluations"][0]
    promised = {"env", "compute", "episodes", "successes", "interval", "first_success_steps", "latency_ms", "seeds"}
    assert promised <= entry.keys()
    assert entry["latency_ms"].keys() == {"p50", "p99"}
    assert len(entry["first_success_steps"]) == len(entry["seeds"]) == entry["episodes"] == 20


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda d: d | {"format": "vlaflow results 9"}, DataError, "vlaflow results 9"),
        (lambda d: d | {"kommand": "x"}, ConfigError, "did you mean 'command'"),
        (lambda d: {k: v for k, v in d.items() if k != "versions"}, ConfigError, "versions"),
        (lambda d: d["evaluations"][0].update(seeds="1000") or d, ConfigError, "seeds"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, error, words):
    file = tmp_path / "results.json"
    results.write(synthetic.results(), file)
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(error, match=words) as refusal:
        results.read(file)
    assert "results.json" in str(refusal.value)


def test_half_a_file_is_refused(tmp_path):
    file = tmp_path / "results.json"
    results.write(synthetic.results(), file)
    file.write_text(file.read_text()[:-200])
    with pytest.raises(DataError, match="damaged"):
        results.read(file)


def test_successes_are_counted_up_to_the_max_steps_and_up_to_the_limits_of_published_evaluations():
    entry = next(e for e in synthetic.results().evaluations if any(s and s > 400 for s in e.first_success_steps))
    assert entry.successes == sum(s is not None for s in entry.first_success_steps)
    early = sum(s is not None and s <= 400 for s in entry.first_success_steps)
    assert early < entry.successes
    assert entry.within == (results.Within("lerobot", 500, entry.successes), results.Within("evo1", 400, early))
    assert entry.interval == (wilson(entry.successes, 20).low, wilson(entry.successes, 20).high)


def repeated(noise_seeds):
    """Results of the same made-up episodes, each of them repeated with the same outcome."""
    found = [replace(e, noise_seed=r) for e in synthetic.episodes() for r in range(noise_seeds)]
    return results.count(found, [], n_action_steps=8, max_steps=500, render="fast", solver_steps=10)


def test_repetitions_are_counted_as_episodes_but_not_as_evidence():
    """Identical ones change the counts and no interval; the p-value stays that of one repetition."""
    once, often = repeated(1), repeated(3)
    assert [e.interval for e in often] == [e.interval for e in once]
    assert [(e.episodes, e.effective_episodes) for e in often] == [(60, 20.0)] * 9
    assert often[0].seeds[:4] == (1000, 1000, 1000, 1001)
    assert often[0].noise_seeds[:4] == (0, 1, 2, 0)
    assert [o.interval for o in results.pool(often)] == [o.interval for o in results.pool(once)]
    for test, plain in zip(results.compare(often), results.compare(once), strict=True):
        assert test.p_value == plain.p_value
        assert test.interval == pytest.approx(plain.interval, abs=1e-12)
        assert test.detectable == pytest.approx(plain.detectable)
        assert test.episodes_needed == (None if plain.episodes_needed is None else 3 * plain.episodes_needed)


def test_one_noise_seed_is_reported_as_before():
    """Wilson's interval, McNemar's test and Newcombe's interval of the plain counts, to the bit."""
    found = repeated(1)
    for entry in found:
        assert entry.interval == (wilson(entry.successes, 20).low, wilson(entry.successes, 20).high)
    for test in results.compare(found):
        table = PairedOutcomes(test.both, test.only_first, test.only_second, test.neither)
        interval = paired_difference(table)
        assert (test.interval, test.p_value) == ((interval.low, interval.high), mcnemar(table))
        assert test.effective_pairs == table.n


def test_a_seed_with_fewer_repetitions_is_refused():
    some = [replace(e, noise_seed=r) for e in synthetic.episodes() for r in range(1 + (e.seed > 1003))]
    with pytest.raises(ConfigError, match="same number of noise seeds"):
        results.count(some, [], n_action_steps=8, max_steps=500, render="fast", solver_steps=10)


def test_limits_of_published_evaluations_are_pooled_and_those_beyond_the_max_steps_left_out():
    dense = [e for e in synthetic.results().evaluations if e.compute == "dense"]
    (overall,) = results.pool(dense)
    assert overall.within == {p: sum(w.successes for e in dense for w in e.within if w.protocol == p) for p in overall.within}
    assert set(overall.within) == {"lerobot", "evo1"}
    cut = results.count(
        synthetic.episodes(), synthetic.latency(), n_action_steps=8, max_steps=450, render="fast", solver_steps=10
    )
    assert {w.protocol for e in cut for w in e.within} == {"evo1"}


def test_every_paired_test_accounts_for_every_seed():
    for test in synthetic.results().paired:
        n = 60 if test.env == "all" else 20
        assert test.both + test.only_first + test.only_second + test.neither == n
        assert test.difference == pytest.approx((test.only_second - test.only_first) / n)


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (4, 6), (5, 4)])
def test_few_compute_policies_are_tested_in_every_pair_and_many_against_the_first(count, pairs):
    """The demo's four, so that regeneration meets its control."""
    dense = [e for e in synthetic.results().evaluations if e.compute == "dense"]
    named = [replace(e, compute=f"c{i}") for i in range(count) for e in dense]
    found = [(test.first, test.second) for test in results.compare(named) if test.env == "all"]
    assert len(found) == len(set(found)) == pairs
    assert all(first == "c0" for first, _ in found) == (count != 4)


def test_other_seeds_cannot_be_paired():
    evaluations = results.count(
        [e for e in synthetic.episodes() if e.compute != "refine" or e.seed != 1003],
        synthetic.latency(),
        n_action_steps=8,
        max_steps=500,
        render="fast",
        solver_steps=10,
    )
    with pytest.raises(ConfigError, match="same seeds"):
        results.compare(evaluations)


def test_the_language_swap_compares_with_the_first_noise_seed():
    """Its own episodes have no other."""
    from vlaflow.compute.dense import Dense

    env = synthetic.ENVS[0]
    test = language.plan_swap([env], Dense(), 2)
    dense = [replace(e, instruction=test.instructions[env, "right"]) for e in synthetic.episodes() if e.compute == "dense"]
    other = [replace(e, noise_seed=1, success=not e.success, first_success_step=None) for e in dense]
    swapped = [replace(dense[0], seed=job.seed, instruction=job.instruction) for job in test.jobs]
    assert language.count_swap(test, dense + other, swapped, 500) == language.count_swap(test, dense, swapped, 500)


def test_the_language_swap_tells_every_environment_something_else():
    from vlaflow.compute.dense import Dense

    test = language.plan_swap(synthetic.ENVS, Dense(), 2)
    assert len(test.jobs) == 3 * 2 * 2
    for env in synthetic.ENVS:
        said = {test.instructions[env, kind] for kind in language.KINDS}
        assert len(said) == 3
    alone = language.plan_swap(synthetic.ENVS[:1], Dense(), 1)
    assert alone.instructions[synthetic.ENVS[0], "other"] not in ("", "Open a drawer")
