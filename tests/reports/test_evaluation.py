"""The page needs nothing but itself, and holds every number."""

import re
import warnings
from dataclasses import replace

import pytest

from tests.reports import synthetic
from vlaflow.evaluation import results
from vlaflow.reports import evaluation as evaluation_page
from vlaflow.reports import evaluation_plots as plots
from vlaflow.reports.evaluation import caveats, steps_table, write_report
from vlaflow.reports.words import middle, percent, played, too_few


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    synthetic.write(out)
    return write_report(out, {"velocity error": synthetic.log(), "rating error": synthetic.log(150)}).read_text()


def test_the_page_asks_no_server_for_anything(page):
    outside = [link for link in re.findall(r"""(?:src|href|poster|data)\s*=\s*["']([^"']*)""", page) if link[:1] != "#"]
    assert outside
    assert all(link.startswith("data:") for link in outside)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


def test_the_page_holds_every_number(page):
    made = synthetic.results()
    for entry in made.evaluations:
        assert f"{entry.successes}/{entry.episodes} <small>{percent(entry.interval)}</small>" in page
        for step in (min(s for s in entry.first_success_steps if s), max(s for s in entry.first_success_steps if s)):
            assert f"<td>{step}</td>" in page
    for entry in made.latency:
        assert f"<td>{entry.total.p50:.1f}</td><td>{entry.total.p99:.1f}</td>" in page
        assert f"<td>{entry.layer_passes:.1f}</td>" in page
    for entry in made.language:
        assert f"{entry.successes}/{entry.episodes} <small>{percent(entry.interval)}</small>" in page
    for name, version in made.versions.items():
        assert f"{name} {version}" in page
    assert "install 2.1, record 1.4, train 6.3, rater 0.9, evaluate 2.6, total 13.3" in page
    assert ", ".join(map(str, range(1000, 1020))) in page
    assert made.commands[0] in page


def test_text_is_escaped_and_drawings_are_not(page):
    assert "--out &lt;runs&gt;" in page
    assert page.count("<svg") == 6 + 2 * len({f.episode.env for f in synthetic.videos()})
    assert "&lt;svg" not in page


def test_no_two_drawings_share_an_id(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_colours_come_from_the_page(page):
    """A colour that is not a CSS variable would be unreadable on one of the two backgrounds."""
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)


def test_videos_play_and_carry_what_they_show(page):
    assert page.count("<video") == page.count("data:video/mp4;base64,") == len(synthetic.videos())
    assert "no success in 500 steps" in page


def test_an_evaluation_without_videos_logs_and_language_still_reports(tmp_path):
    made = replace(synthetic.results(), language=(), minutes=results.Minutes(evaluate=1.0).summed(), commands=())
    results.write(made, tmp_path / "results.json")
    page = write_report(tmp_path).read_text()
    assert "<video" not in page
    assert 'id="language"' not in page
    assert made.command in page


def test_the_page_opens_with_a_video_the_success_rate_and_the_latency(page):
    """What people come for comes before the first heading, whatever else is measured."""
    opening = page[page.index("<body>") : page.index("<h2")]
    overall, latency = synthetic.results().overall[0], synthetic.results().latency[0]
    assert opening.count("<video") == 1
    assert "success at step" in opening
    assert f"{100 * overall.successes / overall.episodes:.1f} %" in opening
    assert percent(overall.interval) in opening
    assert f"{latency.total.p50:.1f} ms" in opening


def test_tests_with_nothing_to_tell_are_folded_and_those_with_something_are_open(tmp_path):
    made = synthetic.results()
    quiet = tuple(replace(test, p_value=0.5) for test in made.paired)
    for paired, opened, said in (
        (quiet, False, "12 paired tests: none with p below 0.05"),
        ((replace(quiet[0], p_value=0.01), *quiet[1:]), True, "12 paired tests: 1 with p below 0.05"),
    ):
        results.write(replace(made, paired=paired), tmp_path / "results.json")
        written = write_report(tmp_path).read_text()
        assert said in written
        assert f"<details{' open' * opened}><summary>{said}" in written
        assert written.count("<td>0.5</td>") == sum(test.p_value == 0.5 for test in paired), "folded, not left out"


def test_a_difference_that_so_few_episodes_cannot_show_comes_with_a_warning(tmp_path):
    """Twenty pairs cannot tell five points from chance; a significant difference needs no such sentence."""
    made = synthetic.results()
    mild = tuple(
        replace(test, difference=0.05, p_value=0.6, detectable=0.25 + 0.1 * (test.env == "all"), episodes_needed=741)
        for test in made.paired
    )
    assert too_few(replace(made, paired=mild)) == [
        "With 20 pairs per environment, differences below about 25 points cannot be told from chance; at least 741 episodes "
        "per environment would be needed for the 5.0 points shown (refine against dense, drawer-open).",
        "With 60 pairs over all environments, differences below about 35 points cannot be told from chance; at least 741 "
        "episodes over all environments would be needed for the 5.0 points shown (refine against dense).",
    ]
    none = tuple(replace(test, difference=0.0, p_value=1.0, detectable=0.2, episodes_needed=None) for test in made.paired[-1:])
    assert too_few(replace(made, paired=none)) == [
        "With 60 pairs, differences below about 20 points cannot be told from chance."
    ]
    assert not too_few(replace(made, paired=tuple(replace(test, p_value=0.01) for test in mild)))
    results.write(replace(made, paired=mild), tmp_path / "results.json")
    assert "cannot be told from chance" in write_report(tmp_path).read_text()


def counted(episodes):
    return results.count(episodes, synthetic.latency(), n_action_steps=8, max_steps=500, render="fast", solver_steps=10)


def test_what_is_over_all_environments_says_so():
    """In the plot and in the table of paired tests, as in the table of rates."""
    made = synthetic.results()
    assert ">all</text>" in plots.success(made)
    found = evaluation_page.paired(made)
    assert {row[0] for row in found["table"].rows} == {"drawer-open", "button-press-topdown", "window-close", "all"}


def test_the_median_of_two_steps_lies_between_them(tmp_path):
    assert middle((50, None, 150)) == "100"
    assert middle((50, 151)) == "100.5"
    assert middle((7,)) == "7"
    assert middle((None,)) == "none"
    two = [
        replace(e, success=True, first_success_step=step) for e, step in zip(synthetic.episodes()[::3], (50, 150), strict=False)
    ]
    assert steps_table(replace(synthetic.results(), evaluations=counted(two))).rows[0][2:5] == ["100", "50", "150"]


def test_one_episode_is_not_spoken_of_as_several():
    evaluations = counted([e for e in synthetic.episodes() if e.seed == 1003])
    made = replace(synthetic.results(), evaluations=evaluations, paired=results.compare(evaluations))
    assert played(made) == "1 episode each, seed 1003"
    assert all(sentence.startswith(("With 1 pair per", "With 3 pairs over")) for sentence in too_few(made))


def test_repetitions_are_described(tmp_path):
    """The page says how many noise seeds there were, and names the methods that account for them."""
    episodes = [replace(e, noise_seed=r) for e in synthetic.episodes() for r in range(3)]
    evaluations = results.count(episodes, synthetic.latency(), n_action_steps=8, max_steps=500, render="fast", solver_steps=10)
    made = replace(
        synthetic.results(),
        evaluations=evaluations,
        overall=results.pool(evaluations),
        paired=results.compare(evaluations),
    )
    results.write(made, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == made
    page = write_report(tmp_path).read_text()
    assert "60 episodes each, seeds 1000 to 1019, 3 noise seeds each" in page
    assert "permutation test over environment seeds" in page
    assert "(worth 20 independent ones)" in page


def test_the_same_results_give_the_same_page(tmp_path):
    """No counter and no time finds its way into the page."""
    synthetic.write(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_the_legend_of_many_compute_policies_leaves_the_plot_room():
    """Matplotlib warns where the decorations of a plot leave no room for the plot itself."""
    made = synthetic.results()
    many = tuple(replace(e, compute=f"{e.compute}:{number}") for number in range(3) for e in made.evaluations)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.success(replace(made, evaluations=many, overall=results.pool(many)))
        plots.minutes(results.Minutes(2.1, 1.4, 6.3, 0.9, 0.2, 2.6).summed())


def test_only_a_refinement_by_a_rater_has_the_limits_of_a_rater():
    made = synthetic.results()
    assert any("rater" in sentence for sentence in caveats(made))
    unrated = replace(made, latency=tuple(entry for entry in made.latency if "rater" not in entry.parts))
    assert not any("rater" in sentence for sentence in caveats(unrated))
