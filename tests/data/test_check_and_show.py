import json
import re
import shlex

import numpy as np
import pytest

from tests.data.toyset import FPS, LENGTHS, cut_in_half, edit_info, edit_table, episode, writer
from vlaflow.cli.data import main
from vlaflow.data.check import check
from vlaflow.data.lerobot import Dataset
from vlaflow.data.video import encode_video
from vlaflow.errors import DataError


def test_sound_data_set_has_no_problems(dataset):
    calls = []
    findings = check(dataset, progress=lambda done, total: calls.append((done, total)))
    assert findings.problems == ()
    assert findings.frames == 2 * sum(LENGTHS)
    assert calls[-1] == (10, 10)


def test_check_lists_everything_that_is_wrong(copy):
    """One spoilt number, one view whose file ends early: the search goes on after the first find."""

    def spoil(rows):
        rows[3][0] = np.nan
        return rows

    edit_table(copy / "data/chunk-000/file-000.parquet", "action", spoil)
    frames = np.concatenate([episode(i)[0]["corner"] for i in range(3)])
    encode_video(frames, copy / "videos/observation.images.corner/chunk-000/file-000.mp4", FPS)
    problems = check(Dataset.open(copy)).problems
    assert len(problems) == 3
    assert "Episode 0" in problems[0]
    assert "'action' at frame 3" in problems[0]
    assert "Episode 3" in problems[1]
    assert "Episode 4" in problems[2]


def test_check_lists_the_rows_of_every_episode_that_are_wrong(copy):
    """Reading stops at the first of them; repairing it would lead from one to the next."""

    def spoil(rows):
        starts = np.cumsum([0, *LENGTHS])
        for number in (0, 2, 4):
            rows[starts[number] + 1][0] = np.nan
        return rows

    edit_table(copy / "data/chunk-000/file-000.parquet", "action", spoil)
    cut_in_half(next(copy.glob("videos/*corner/*/*.mp4")))
    problems = check(Dataset.open(copy)).problems
    for number in range(5):
        assert sum(f"Episode {number} of" in problem for problem in problems) == (2 if number in (0, 2, 4) else 1)


def test_check_notes_cameras_that_recorded_nothing(tmp_path):
    """Covered in one episode of four, frozen in two; a few frames alike are no frozen camera."""
    rng = np.random.default_rng(0)
    root = tmp_path / "dead cameras"
    with writer(root) as out:
        for number in range(4):
            images, state, action = episode(number, 2 if number == 3 else FPS)
            if number in (0, 1, 3):
                images["corner"][:] = images["corner"][0]
            if number == 2:
                images["image"][:] = rng.integers(0, 4, images["image"].shape)
            out.add(images, state, action, "push the puck")
    remarks = check(Dataset.open(root)).remarks
    covered = (
        f"The view 'image' has one colour in 1 of 4 episodes.*data drop {re.escape(shlex.quote(str(root)))} --episodes 2 --out"
    )
    assert sum(bool(re.search(covered, remark)) for remark in remarks) == 1
    frozen = "The view 'corner' is one image that never changes in 2 of 4 episodes.*--episodes 0-1 --out"
    assert sum(bool(re.search(frozen, remark)) for remark in remarks) == 1
    kept = tmp_path / "kept"
    assert main(["drop", str(root), "--episodes", "0-1", "2", "--out", str(kept)]) == 0
    assert not any("camera" in remark for remark in check(Dataset.open(kept)).remarks)


def test_a_camera_that_recorded_nothing_in_any_episode_can_be_left_out(tmp_path):
    root = tmp_path / "dead"
    with writer(root) as out:
        for number in range(2):
            images, state, action = episode(number)
            images["corner"][:] = 0
            out.add(images, state, action, "push the puck")
    (remark,) = (each for each in check(Dataset.open(root)).remarks if "camera" in each)
    assert "'corner' has one colour in every episode" in remark
    assert remark.endswith("Train without it: --view image")


def test_check_finds_frames_without_rows(copy):
    """The first episodes read well, but one frame more than rows means that somewhere the two do not belong together."""
    frames = np.concatenate([episode(i)[0]["corner"] for i in range(5)])
    encode_video(np.concatenate([frames, frames[:1]]), copy / "videos/observation.images.corner/chunk-000/file-000.mp4", FPS)
    problems = check(Dataset.open(copy)).problems
    assert len(problems) == 1
    assert f"holds {sum(LENGTHS) + 1} frames" in problems[0]


def test_check_remarks_on_what_may_be_meant(copy):
    edit_table(copy / "data/chunk-000/file-000.parquet", "observation.state", lambda rows: [[r[0], 0.5] for r in rows])
    edit_table(copy / "data/chunk-000/file-000.parquet", "action", lambda rows: [[2 * a for a in r] for r in rows])
    (copy / "meta/stats.json").unlink()
    remarks = " ".join(check(Dataset.open(copy)).remarks)
    assert "state: dimension 1 never changes" in remarks
    assert "action 'dx' leaves its range [-1, 1]" in remarks
    assert "meta/stats.json is missing" in remarks
    edit_info(copy, x_vlaflow={})
    assert "No action spec" in " ".join(check(Dataset.open(copy)).remarks)


def test_command_check_returns_0_or_1(copy, capsys):
    assert main(["check", str(copy)]) == 0
    assert f"No problems: {sum(LENGTHS)} rows read, {2 * sum(LENGTHS)} frames decoded" in capsys.readouterr().out
    cut_in_half(next(copy.glob("videos/*corner/*/*.mp4")))
    assert main(["check", str(copy)]) == 1
    printed = capsys.readouterr().out
    assert "5 problem(s) found" in printed
    assert "PROBLEM: Episode 4 of" in printed


def test_commands_refuse_what_is_no_data_set(tmp_path):
    for command in ("check", "show"):
        with pytest.raises(DataError, match="not a LeRobot data set"):
            main([command, str(tmp_path)])


def test_command_show_prints_tasks_and_statistics(copy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["show", str(copy)]) == 0
    printed = capsys.readouterr().out
    for word in ("push the puck", "open the drawer", "gripper", "toy arm", "corner 32x48", "q01"):
        assert word in printed, word


def test_command_show_abbreviates_neither_names_nor_numbers(copy, capsys, monkeypatch):
    """Where a terminal is narrow, long names go on in the next line: two that only differ at their end would look alike."""
    info = json.loads((copy / "meta/info.json").read_text())
    names = ["left_follower_wrist_angle.pos", "left_follower_wrist_rotate.pos", "left_gripper"]
    info["features"]["action"]["names"] = names
    edit_info(copy, features=info["features"], x_vlaflow={})
    scale = np.array([-1e-6, 1.0, 12345.0])
    edit_table(copy / "data/chunk-000/file-000.parquet", "action", lambda rows: [(np.array(r) * scale).tolist() for r in rows])
    monkeypatch.setenv("COLUMNS", "80")
    far = copy.rename(copy.with_name("demonstrations-of-" + "a-long-name" * 8))
    assert main(["show", str(far)]) == 0
    assert "…" not in capsys.readouterr().out


def test_help_carries_an_example(capsys):
    for command in ("check", "show"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"vlaflow data {command} runs/demo/dataset" in capsys.readouterr().out


def test_info_keeps_our_block_where_lerobot_ignores_it(pristine):
    """Unknown keys of info.json are only a warning there; features must hold nothing of ours."""
    info = json.loads((pristine / "meta/info.json").read_text())
    assert set(info["x_vlaflow"]) == {"action_spec", "provenance"}
    assert not any("vlaflow" in key for key in info["features"])


TEXT = "[/red] $\\frac{$ \x1b[31m<script>a</script>\r\x07 :smile: \u202e"


def test_text_of_a_data_set_is_shown_and_never_interpreted(copy, tmp_path, capsys):
    """Markup of rich, formulas of matplotlib, elements of HTML and control characters of a terminal."""
    edit_table(copy / "meta/tasks.parquet", "task", lambda tasks: [TEXT + str(i) for i in range(len(tasks))])
    edit_table(copy / "meta/episodes/chunk-000/file-000.parquet", "tasks", lambda tasks: [[TEXT + "0"]] * len(tasks))
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["$\\frac{$", "[/x]\x1b", "<b>"]
    edit_info(copy, features=info["features"], robot_type="[/red]\x1b[2J", x_vlaflow={})
    page = tmp_path / "page.html"
    assert main(["show", str(copy), "--out", str(page), "--episodes", "1"]) == 0
    assert main(["spec", str(copy)]) == 0
    said = "".join(capsys.readouterr())
    for part in ("[/red]\\x1b[2J", "$\\frac{$", "\\x1b[31m", "<script>", ":smile:", "[/x]\\x1b"):
        assert part in said
    for text in (said, page.read_text()):
        assert all(c.isprintable() or c == "\n" for c in text.replace("\\u00a0", ""))
    assert "<script>a" not in page.read_text()
