"""An evaluation on several machines comes to the results of one, and parts that do not belong together are refused."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.evaluation.conftest import CONFIG, ENV, untimed
from vlaflow.cli.main import main
from vlaflow.errors import CheckpointError, ConfigError, DataError
from vlaflow.evaluation import results
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.prepared import RESULTS
from vlaflow.evaluation.rollout import EpisodeResult, RolloutConfig
from vlaflow.evaluation.run import merge, play_shard
from vlaflow.evaluation.shards import Shard, read_shards

BLOCKS = [[0, 2], [1, 3], [4]]


def test_merged_shards_are_the_evaluation_of_one_machine_byte_for_byte(checkpoint, whole, tmp_path, monkeypatch):
    """The second shard is interrupted within a block and continued."""
    play_shard(checkpoint, CONFIG, tmp_path, Shard(1, 2))
    add = EpisodeLog.add

    def and_stop(self, number, episode):
        add(self, number, episode)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeLog, "add", and_stop)
        with pytest.raises(KeyboardInterrupt):
            play_shard(checkpoint, CONFIG, tmp_path, Shard(2, 2))
    with pytest.raises(DataError, match=r"shard-2-of-2\.jsonl holds 1 of its 3 episodes\. Run its command again"):
        merge(tmp_path)
    assert play_shard(checkpoint, CONFIG, tmp_path, Shard(2, 2)) == 3
    found = merge(tmp_path)
    assert untimed(tmp_path) == whole
    assert len(found.commands) == 2
    assert not list(tmp_path.glob("shard-*"))


def test_the_command_of_a_shard_says_how_to_go_on(checkpoint, tmp_path, capsys):
    words = ["eval", str(checkpoint), "--env", ENV, "--episodes", "2", "--max-steps", "4", "--steps", "1", "--workers", "0"]
    words += ["--no-videos", "--batch", "1", "--out", str(tmp_path), "--dtype", "bf16"]
    for shard in ("1/2", "2/2"):
        assert main([*words, "--shard", shard]) == 0
    assert f"vlaflow merge {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    assert main([*words, "--shard", "3/2"]) == 2
    assert main([*words, "--shard", "two"]) == 2
    said = capsys.readouterr().err
    assert "numbered 1 to 2" in said
    assert "such as 2/4" in said
    assert main(["merge", str(tmp_path)]) == 0
    found = results.read(tmp_path / RESULTS)
    assert (found.evaluations[0].seeds, found.dtype) == ((1000, 1001), "bf16")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_block_is_in_one_shard(of):
    taken = [block for number in range(1, of + 1) for block in Shard(number, of).of_blocks(BLOCKS)]
    assert sorted(taken) == BLOCKS


# -- logs without a policy ---------------------------------------------------------------------------------------------


def episode(seed):
    return EpisodeResult(ENV, "dense", seed, "Open", True, 3, 3, 1, 1, 1, 0)


def left(folder, shard, jobs, **settings):
    """A shard's log that holds these jobs."""
    settings = {"seeds": 5, "machine": "a"} | settings
    with EpisodeLog(folder, EpisodeResult, settings, about={"command": f"play {shard}"}, name=shard.file) as log:
        for job in jobs:
            log.add(job, episode(job))


def test_shards_of_other_machines_are_put_together_in_the_order_of_the_jobs(tmp_path):
    left(tmp_path, Shard(1, 2), [4, 0, 2])
    left(tmp_path, Shard(2, 2), [3, 1], machine="b")
    found = read_shards(tmp_path)
    assert [each.seed for each in found.episodes(BLOCKS)] == [0, 1, 2, 3, 4]
    assert found.machines == ("a", "b")
    assert found.commands == ("play 1/2", "play 2/2")


@pytest.mark.parametrize(
    ("others", "kind", "message"),
    [
        ([], DataError, r"lacks --shard 2/3, 3/3"),
        ([(Shard(1, 2), {})], ConfigError, r"shards of 2 and 3, which do not belong together"),
        ([(Shard(2, 3), {}), (Shard(3, 3), {"seeds": 6})], ConfigError, r"shard-3-of-3.* with seeds = 6, .* with 5"),
    ],
)
def test_shards_that_are_no_whole_are_refused(tmp_path, others, kind, message):
    left(tmp_path, Shard(1, 3), [0, 2])
    for shard, settings in others:
        left(tmp_path, shard, [1], **settings)
    with pytest.raises(kind, match=message):
        read_shards(tmp_path)


def test_a_folder_without_shards_and_a_shard_that_is_still_running_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="There is no shard in"):
        read_shards(tmp_path)
    with (
        EpisodeLog(tmp_path, EpisodeResult, {}, name=Shard(1, 1).file),
        pytest.raises(ConfigError, match="still writing"),
    ):
        read_shards(tmp_path)


def test_a_shard_that_was_killed_before_its_first_line_is_told_apart_from_another_file(tmp_path):
    """A kill or a full disk may leave nothing, or a part of the first line."""
    for content in ("", '{"format": "vlaflow ep'):
        (tmp_path / Shard(1, 1).file).write_text(content)
        with pytest.raises(
            DataError, match=r"shard-1-of-1\.jsonl ends before its first line does\. Run the command that began it again"
        ):
            read_shards(tmp_path)


def test_a_checkpoint_that_lies_elsewhere_here_is_named_to_merge(checkpoint, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(checkpoint, there)
    config = replace(CONFIG, computes=("dense",), episodes=1, language_episodes=0, rollout=RolloutConfig(max_steps=4))
    play_shard(there, config, tmp_path / "out", Shard(1, 1))
    there.rename(here)
    with pytest.raises(CheckpointError, match=f"played with {there}, .* vlaflow merge {tmp_path / 'out'} --checkpoint DIR"):
        merge(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"^There is no checkpoint folder"):
        merge(tmp_path / "out", checkpoint=there)
    assert merge(tmp_path / "out", checkpoint=here).checkpoint == str(here)


def test_a_shard_of_another_version_is_refused(checkpoint, tmp_path):
    """Its settings are compared with those that this machine would play it with."""
    config = replace(CONFIG, computes=("dense",), episodes=1, language_episodes=0)
    play_shard(checkpoint, config, tmp_path, Shard(1, 1))
    file = tmp_path / Shard(1, 1).file
    header, *rest = file.read_text().splitlines()
    changed = json.loads(header)
    changed["settings"]["versions"]["torch"] = "1.0"
    file.write_text("\n".join([json.dumps(changed), *rest, ""]))
    with pytest.raises(ConfigError, match="this machine would play it with"):
        merge(tmp_path)
    assert file.exists(), "a refused merge removes nothing"
