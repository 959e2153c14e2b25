"""Questions about scenes: their truth checked against the image and against things that are moved, and the recorded set."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import mujoco
import numpy as np
import pytest
from PIL import Image

from vlaflow.cli.record_vqa import main
from vlaflow.data.vqa import VqaDataset
from vlaflow.errors import CapabilityError, ConfigError, DataError
from vlaflow.simulators import make
from vlaflow.simulators.experts import Noise
from vlaflow.simulators.metaworld import CAMERA
from vlaflow.simulators.metaworld_scenes import SCENES, pixel
from vlaflow.simulators.metaworld_tasks import TASKS
from vlaflow.simulators.record import episode_seed
from vlaflow.simulators.record_vqa import FIRST_RUN, SampledFrame, VqaRecordingConfig, balance, record_vqa
from vlaflow.simulators.scenes import KINDS, Condition, Facts, Margins, Thing, VqaItem, ask, facts_of

ENVS = ("metaworld/window-close-v3", "metaworld/button-press-topdown-v3")


def answers(facts, **margins):
    return {asked.question: asked.answer for asked in ask(facts, Margins(**margins))}


def scene(gripper=(0.5, 0.5), thing=(0.5, 0.5), metres=0.1, opening=0.6, other=None):
    things = {"cup": Thing(np.array([metres, 0.0, 0.0]), np.array(thing))}
    if other is not None:
        things["box"] = Thing(np.array([0.0, other, 0.0]), np.array(thing))
    return Facts("cup", Thing(np.zeros(3), np.array(gripper)), opening, things)


# -- from facts to answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "question", "answer"),
    [
        (scene(gripper=(0.3, 0.5)), "Is the gripper left or right of the cup in the image?", "left"),
        (scene(gripper=(0.7, 0.5)), "Is the gripper left or right of the cup in the image?", "right"),
        (scene(gripper=(0.52, 0.5)), "Is the gripper left or right of the cup in the image?", None),
        (scene(gripper=(0.5, 0.3)), "Is the gripper above or below the cup in the image?", "above"),
        (scene(gripper=(0.5, 0.7)), "Is the gripper above or below the cup in the image?", "below"),
        (scene(gripper=(0.5, 1.2)), "Is the gripper above or below the cup in the image?", None),  # out of view
        (scene(metres=0.05), "Is the gripper near the cup or far from it?", "near"),
        (scene(metres=0.10), "Is the gripper near the cup or far from it?", None),
        (scene(metres=0.20), "Is the gripper near the cup or far from it?", "far"),
        (scene(metres=0.1, other=0.3), "Is the gripper nearer to the cup or the box?", "cup"),
        (scene(metres=0.1, other=0.04), "Is the gripper nearer to the cup or the box?", "box"),
        (scene(metres=0.1, other=0.12), "Is the gripper nearer to the cup or the box?", None),
        (scene(opening=0.95), "Is the gripper open or closed?", "open"),
        (scene(opening=0.3), "Is the gripper open or closed?", "closed"),
        (scene(opening=0.6), "Is the gripper open or closed?", None),
        (scene((0.2, 0.5), (0.3, 0.5)), "How many of gripper and cup are in the left half of the image?", "two"),
        (scene((0.2, 0.5), (0.8, 0.5)), "How many of gripper and cup are in the left half of the image?", "one"),
        (scene((0.7, 0.5), (0.8, 0.5)), "How many of gripper and cup are in the left half of the image?", "none"),
        (scene((0.7, 0.5), (0.51, 0.5)), "How many of gripper and cup are in the left half of the image?", None),
        (scene(), "What stands on the table?", "cup"),
        (replace(scene(), conditions=(Condition("Is it full?", "yes"),)), "Is it full?", "yes"),
        (replace(scene(), conditions=(Condition("Is it full?", None),)), "Is it full?", None),
    ],
)
def test_answers_follow_from_the_facts_and_doubtful_ones_are_not_asked(facts, question, answer):
    assert answers(facts).get(question) == answer


# -- from the simulator to facts -----------------------------------------------------------------------------------------------


class Envs(dict):
    """Environments, each built when it is first asked for."""

    def __missing__(self, task):
        self[task] = make(f"metaworld/{task}", size=96)
        return self[task]


@pytest.fixture(scope="module")
def envs():
    return Envs()


FINGERS = {"rightclaw", "leftclaw", "rightpad", "leftpad"}


def centre(env, bodies):
    """Where bodies are in the image, found without any geometry: the pixels that change when they are made invisible."""
    model = env._sim.model
    before = env.render().astype(int)
    geoms = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name in bodies]
    kept = model.geom_rgba[geoms].copy()
    model.geom_rgba[geoms, 3] = 0
    env._image = None
    changed = np.abs(env.render() - before).sum(-1) > 30
    model.geom_rgba[geoms] = kept
    env._image = None
    assert changed.sum() > 4
    rows, columns = np.nonzero(changed)
    return (np.array([columns.mean(), rows.mean()]) + 0.5) / 96


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("task", "thing", "bodies", "within"),
    [
        ("button-press-topdown-v3", "button", {"button"}, 0.035),
        ("push-v3", "puck", {"obj"}, 0.02),
        ("peg-insert-side-v3", "peg", {"peg"}, 0.05),
        ("push-v3", None, FINGERS, 0.04),
    ],
)
def test_things_are_in_the_image_where_the_facts_say(envs, task, thing, bodies, within, seed):
    """Reset places them again with each seed."""
    env = envs[task]
    env.restart(seed)
    facts = facts_of(env)
    said = facts.gripper if thing is None else facts.things[thing]
    assert np.abs(said.pixel - centre(env, bodies)).max() < within


def test_the_middle_of_the_view_is_the_middle_of_the_image(envs):
    """And a step along the camera's own axes goes right and up there, mirrored by the turn of 180 degrees."""
    sim = envs["push-v3"]._sim
    number = sim.model.camera(CAMERA).id
    here, axes = sim.data.cam_xpos[number], sim.data.cam_xmat[number].reshape(3, 3)
    ahead = here - 0.5 * axes[:, 2]
    np.testing.assert_allclose(pixel(sim.model, sim.data, CAMERA, ahead), [0.5, 0.5], atol=1e-9)
    right, up = (pixel(sim.model, sim.data, CAMERA, ahead + 0.1 * axes[:, i]) for i in (0, 1))
    assert right[0] < 0.5 < up[1]
    assert not np.isfinite(pixel(sim.model, sim.data, CAMERA, here + axes[:, 2])).any()


def move_hand(env, goal, grip=-1.0, steps=60):
    for _ in range(steps):
        env.advance(np.append(np.clip((np.array(goal) - env.raw_observation[:3]) / 0.01, -1, 1), grip).astype(np.float32))


def test_moving_the_puck_past_the_gripper_changes_the_answers(envs):
    """And where both are seen in the image agrees."""
    env, question = envs["push-v3"], "Is the gripper left or right of the puck in the image?"
    env.restart(3)
    move_hand(env, (0.0, 0.65, 0.2), steps=30)
    said = []
    for x in (-0.25, 0.25):
        qpos, qvel = env._sim.data.qpos.copy(), env._sim.data.qvel.copy()
        qpos[9:12] = (x, 0.65, 0.02)
        env._sim.set_state(qpos, qvel)
        mujoco.mj_forward(env._sim.model, env._sim.data)
        env._image = None
        said.append(answers(facts_of(env))[question])
        shown = centre(env, {"obj"})[0], centre(env, FINGERS)[0]
        assert said[-1] == ("right" if shown[1] > shown[0] else "left")
    assert set(said) == {"left", "right"}


def test_moving_the_hand_changes_near_and_above_and_closing_it_changes_the_gripper(envs):
    env = envs["push-v3"]
    env.restart(4)
    puck = facts_of(env).things["puck"].position
    move_hand(env, puck + np.array([0, 0, 0.25]))
    above = answers(facts_of(env))
    assert above["Is the gripper near the puck or far from it?"] == "far"
    assert above["Is the gripper above or below the puck in the image?"] == "above"
    assert above["Is the gripper open or closed?"] == "open"
    move_hand(env, puck + np.array([0, 0, 0.03]), grip=1.0)
    there = answers(facts_of(env))
    assert there["Is the gripper near the puck or far from it?"] == "near"
    assert there["Is the gripper open or closed?"] == "closed"


@pytest.mark.parametrize(
    ("task", "joint", "values", "question", "expected"),
    [
        ("drawer-open-v3", "goal_slidey", (0.0, -0.05, -0.15), "Is the drawer open or closed?", ("closed", None, "open")),
        ("window-open-v3", "window_slide", (0.0, 0.07, 0.19), "Is the window open or closed?", ("closed", None, "open")),
        ("door-open-v3", "doorjoint", (0.0, -0.3, -1.2), "Is the door open or closed?", ("closed", None, "open")),
        ("button-press-topdown-v3", "btnbox_joint", (0.0, -0.03, -0.08), "Is the button pressed?", ("no", None, "yes")),
    ],
)
def test_moving_a_joint_changes_the_state_and_the_image(envs, task, joint, values, question, expected):
    env = envs[task]
    env.restart(5)
    pictures = []
    for value, answer in zip(values, expected, strict=True):
        env._sim.data.joint(joint).qpos[0] = value
        mujoco.mj_forward(env._sim.model, env._sim.data)
        env._image = None
        pictures.append(env.render().astype(int))
        assert answers(facts_of(env)).get(question) == answer
    assert (np.abs(pictures[0] - pictures[2]).sum(-1) > 30).sum() > 20  # of 9216 pixels


@pytest.mark.parametrize("task", ["peg-insert-side-v3", "pick-place-v3"])
def test_lifting_changes_the_answer(envs, task):
    env = envs[task]
    env.restart(6)
    question = next(c.question for c in facts_of(env).conditions)
    assert answers(facts_of(env))[question] == "on the table"
    env._sim.data.qpos[11] += 0.15  # height of the free body
    mujoco.mj_forward(env._sim.model, env._sim.data)
    assert answers(facts_of(env))[question] == "lifted"


def test_every_scene_names_what_its_model_holds(envs):
    """Twins with the same scene are recorded below or share their model."""
    assert set(SCENES) <= set(TASKS)
    for task in set(SCENES) - {"drawer-close-v3", "door-close-v3", "window-close-v3"}:
        env = envs[task]
        env.restart(7)
        facts = facts_of(env)
        assert set(facts.things) == set(SCENES[task].things)
        assert all(np.isfinite(t.position).all() and 0 < t.pixel[0] < 1 for t in facts.things.values())


def test_a_task_without_a_scene_says_which_have_one():
    env = make("metaworld/soccer-v3", size=16)
    env.restart(1)
    with pytest.raises(CapabilityError, match=r"There are no questions about metaworld/soccer-v3 yet.*drawer-open-v3"):
        facts_of(env)
    with pytest.raises(CapabilityError, match="does not state facts"):
        facts_of(type("Mute", (), {"name": "suite/mute"})())


# -- the recorded set ----------------------------------------------------------------------------------------------------------

CONFIG = VqaRecordingConfig(ENVS, episodes=2, frames=6, wander=1, size=48, noise=Noise(0.2))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions") / "one"
    return root, record_vqa(CONFIG, root, workers=0)


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()
    }


def test_any_number_of_workers_gives_the_same_bytes(recorded, tmp_path):
    """Every file, to the byte; and nothing else is left."""
    record_vqa(CONFIG, tmp_path / "two", workers=2)
    assert digests(recorded[0]) == digests(tmp_path / "two")
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_the_set_is_what_the_reader_reads_and_the_readme_counts(recorded):
    root, summary = recorded
    opened = VqaDataset.open(root)
    meta = json.loads((root / "metadata.json").read_text())
    assert len(opened) == summary.questions > 0
    assert {q.kind for q in opened.questions} == set(meta["counts"]) <= set(KINDS) - {"gripper"}
    counted = Counter((q.kind, q.question, q.answer) for q in opened.questions)
    assert counted == Counter(
        {(k, q, a): n for k, wordings in meta["counts"].items() for q, said in wordings.items() for a, n in said.items()}
    )
    assert sorted(opened.images) == sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    assert meta["seeds"][ENVS[0]] == [episode_seed(FIRST_RUN, 0, 0), episode_seed(FIRST_RUN, 1, 0)]
    text = (root / "README.md").read_text()
    assert all(question in text for _, question, _ in counted)
    assert len({q.group for q in opened.questions}) == 4  # episodes


def test_images_show_the_moment_that_is_asked_about(recorded):
    """Every question is asked again of the environment, brought to the recorded seed and step."""
    from vlaflow.simulators.record import find_episode

    root, _ = recorded
    lines = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["env"] == ENVS[0] and "/00000-" in line["image"]]
    found = find_episode(ENVS[0], 0, CONFIG.episode_config(), FIRST_RUN, 48, wander=1)
    env, checked = make(ENVS[0], size=48), 0
    env.restart(found.seed)
    for number, step in enumerate(found.steps):
        for line in (line for line in mine if line["step"] == number):
            asked, answer = (turn["value"] for turn in line["conversations"])
            assert answers(facts_of(env))[asked.removeprefix("<image>\n")] == answer
            assert np.array_equal(np.asarray(Image.open(root / line["image"])), env.render())
            checked += 1
        env.advance(step.executed)
    assert checked == len(mine) > 0


def test_every_wording_has_as_many_questions_with_one_answer_as_with_any_other(recorded):
    """In every environment by itself; what stands on the table is balanced over all of them."""
    root, _ = recorded
    lines = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    numbers: dict = {}
    for line in lines:
        where = "" if line["kind"] == "what" else line["env"]
        asked, answer = (turn["value"] for turn in line["conversations"])
        numbers.setdefault((where, asked), Counter())[answer] += 1
    assert all(len(said) >= 2 and len(set(said.values())) == 1 for said in numbers.values())


def test_balancing_keeps_at_most_so_many_and_drops_what_has_one_answer():
    asked = [(VqaItem("side", "L?", "lr"[i % 3 == 0]), VqaItem("state", "S?", "yes")) for i in range(30)]
    looks = [SampledFrame("s/t", i, i, 0, f"{i}.png", questions) for i, questions in enumerate(asked)]
    kept, dropped = balance(looks, replace(CONFIG, most=4))
    assert Counter(asked.answer for _, asked in kept) == {"l": 4, "r": 4}
    assert dropped == {"s/t": ["S?"]}
    assert Counter(a.answer for _, a in balance(looks, CONFIG)[0]) == {"l": 10, "r": 10}
    assert kept != balance(looks, replace(CONFIG, most=4, seed=1))[0]


def test_wrong_requests_are_one_sentence_and_leave_nothing(recorded, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        record_vqa(CONFIG, recorded[0])
    with pytest.raises(CapabilityError, match="There are no questions"):
        record_vqa(replace(CONFIG, envs=("metaworld/soccer-v3",)), tmp_path / "x", workers=0)
    with pytest.raises(DataError, match="two answers"):
        record_vqa(replace(CONFIG, envs=ENVS[:1], episodes=1, frames=1), tmp_path / "x", workers=0)
    assert not list(tmp_path.iterdir())
    for wrong in ({"seed": 200}, {"frames": 0}, {"wander": 11}, {"episodes": 0}, {"kinds": ("sides",)}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **wrong)
    assert max(episode_seed(FIRST_RUN + 199, 9_999, 98), 0) < 2**32


def test_the_command_records(tmp_path, capsys):
    words = f"--env {ENVS[0]} --episodes 1 --frames 6 --wander 0 --workers 0 --size 16 --kind gripper --out {tmp_path / 'd'}"
    assert main(words.split()) == 0
    assert "gripper: " in capsys.readouterr().out
    assert {q.kind for q in VqaDataset.open(tmp_path / "d").questions} == {"gripper"}
    assert len(VqaDataset.open(tmp_path / "d")) > 0


def test_a_place_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created .* Choose another --out"):
        record_vqa(VqaRecordingConfig(ENVS, episodes=1), tmp_path / "file/deeper/set", workers=0)
