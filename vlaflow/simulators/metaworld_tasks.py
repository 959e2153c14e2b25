"""Facts about Meta-World v3 that need no import of it: the 50 tasks, what an action means, the suite's spec.

Instructions and groups are those of LeRobot's Meta-World configuration, mistakes included,
because published checkpoints were trained on them: push-v3 and push-back-v3 have the same instruction, and lever-pull-v3
says "down" although the lever goes up. The third column says what the simulator actually checks.
Reach, push and pick-place tasks show their goal in the image as a coloured dot only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlaflow.data.simulator_actions import METAWORLD
from vlaflow.simulators.base import SimulatorSpec

Group = Literal["easy", "medium", "hard", "very_hard"]


@dataclass(frozen=True)
class Task:
    """One Meta-World task.

    Args:
        instruction: the sentence given to the policy.
        group: difficulty group (28 easy, 11 medium, 6 hard, 5 very hard).
        about: what has to happen, for readers.
    """

    instruction: str
    group: Group
    about: str


TASKS: dict[str, Task] = {
    "assembly-v3": Task("Pick up a nut and place it onto a peg", "hard", "ring with a handle over a standing peg"),
    "basketball-v3": Task("Dunk the basketball into the basket", "medium", "ball through the hoop; hoop position varies"),
    "bin-picking-v3": Task(
        "Grasp the puck from one bin and place it into another bin", "medium", "cube from the near bin into the far bin"
    ),
    "box-close-v3": Task("Grasp the cover and close the box with it", "medium", "lid by its knob onto the box"),
    "button-press-topdown-v3": Task("Press a button from the top", "easy", "button on top of a box, pushed down"),
    "button-press-topdown-wall-v3": Task(
        "Bypass a wall and press a button from the top", "easy", "as button-press-topdown, behind a low wall"
    ),
    "button-press-v3": Task("Press a button", "easy", "button on the front of a box, pushed away"),
    "button-press-wall-v3": Task("Bypass a wall and press a button", "easy", "as button-press, behind a low wall"),
    "coffee-button-v3": Task("Push a button on the coffee machine", "easy", "button on the machine's front"),
    "coffee-pull-v3": Task("Pull a mug from a coffee machine", "medium", "mug from under the machine to a marked spot"),
    "coffee-push-v3": Task("Push a mug under a coffee machine", "medium", "mug to a spot under the machine"),
    "dial-turn-v3": Task("Rotate a dial 180 degrees", "easy", "flat dial, turned by its rim"),
    "disassemble-v3": Task("Pick a nut out of a peg", "very_hard", "ring with a handle lifted off a peg"),
    "door-close-v3": Task("Close a door with a revolving joint", "easy", "open safe door swung shut"),
    "door-lock-v3": Task("Lock the door by rotating the lock clockwise", "easy", "latch handle turned down"),
    "door-open-v3": Task("Open a door with a revolving joint", "easy", "safe door pulled open by its handle"),
    "door-unlock-v3": Task("Unlock the door by rotating the lock counter-clockwise", "easy", "latch handle turned aside"),
    "drawer-close-v3": Task("Push and close a drawer", "easy", "open drawer pushed in"),
    "drawer-open-v3": Task("Open a drawer", "easy", "drawer pulled 20 cm out by its handle"),
    "faucet-close-v3": Task("Rotate the faucet clockwise", "easy", "tap handle swung to one side"),
    "faucet-open-v3": Task("Rotate the faucet counter-clockwise", "easy", "tap handle swung to the other side"),
    "hammer-v3": Task("Hammer a screw on the wall", "medium", "hammer picked up, nail driven into a block"),
    "hand-insert-v3": Task("Insert the gripper into a hole", "hard", "gripper lowered into a hole in the table"),
    "handle-press-side-v3": Task("Press a handle down sideways", "easy", "handle mounted sideways, pushed down"),
    "handle-press-v3": Task("Press a handle down", "easy", "handle facing the robot, pushed down"),
    "handle-pull-side-v3": Task("Pull a handle up sideways", "easy", "handle mounted sideways, pulled up"),
    "handle-pull-v3": Task("Pull a handle up", "easy", "handle facing the robot, pulled up"),
    "lever-pull-v3": Task("Pull a lever down 90 degrees", "easy", "lever swung up by 90 degrees"),
    "peg-insert-side-v3": Task("Insert a peg sideways", "medium", "peg picked up and pushed into a hole in a box"),
    "peg-unplug-side-v3": Task("Unplug a peg sideways", "easy", "peg pulled out of a box"),
    "pick-out-of-hole-v3": Task("Pick up a puck from a hole", "hard", "puck lifted from a hole to a goal in the air"),
    "pick-place-v3": Task("Pick and place a puck to a goal", "hard", "puck to a goal that may be in the air"),
    "pick-place-wall-v3": Task(
        "Pick a puck, bypass a wall and place the puck", "very_hard", "as pick-place, with a wall in between"
    ),
    "plate-slide-back-side-v3": Task("Get a plate from the cabinet sideways", "easy", "plate out of a sideways cabinet"),
    "plate-slide-back-v3": Task("Get a plate from the cabinet", "easy", "plate out of a cabinet"),
    "plate-slide-side-v3": Task("Slide a plate into a cabinet sideways", "easy", "plate into a sideways cabinet"),
    "plate-slide-v3": Task("Slide a plate into a cabinet", "easy", "plate into a cabinet"),
    "push-back-v3": Task("Push the puck to a goal", "hard", "block drawn back towards the robot, to a goal"),
    "push-v3": Task("Push the puck to a goal", "hard", "puck pushed along the table to a goal"),
    "push-wall-v3": Task("Bypass a wall and push a puck to a goal", "medium", "as push, with a wall in between"),
    "reach-v3": Task("Reach a goal position", "easy", "gripper to a point in the air"),
    "reach-wall-v3": Task("Bypass a wall and reach a goal", "easy", "as reach, with a wall in between"),
    "shelf-place-v3": Task("Pick and place a puck onto a shelf", "very_hard", "block onto a shelf"),
    "soccer-v3": Task("Kick a soccer into the goal", "medium", "ball pushed into a goal"),
    "stick-pull-v3": Task("Grasp a stick and pull a box with the stick", "very_hard", "stick through a handle, pulled"),
    "stick-push-v3": Task("Grasp a stick and push a box using the stick", "very_hard", "stick picked up, container pushed"),
    "sweep-into-v3": Task("Sweep a puck into a hole", "medium", "block swept along the table into a hole"),
    "sweep-v3": Task("Sweep a puck off the table", "medium", "block swept along the table to its edge"),
    "window-close-v3": Task("Push and close a window", "easy", "sliding window pushed shut by its handle"),
    "window-open-v3": Task("Push and open a window", "easy", "sliding window pushed open by its handle"),
}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, task in TASKS.items() if task.group == group)
    for group in ("easy", "medium", "hard", "very_hard")
}

ACTION = METAWORLD

SPEC = SimulatorSpec(
    suite="metaworld",
    tasks={name: task.instruction for name, task in TASKS.items()},
    groups=GROUPS,
    published=tuple(GROUPS),
    robot="metaworld_sawyer",
    action=ACTION,
    # hand position in metres (world), then the fingers' distance as a fraction of 0.1 m: 1 open, 0 closed
    state_names=("x", "y", "z", "gripper_opening"),
    views=("image",),
    max_steps=dict.fromkeys(TASKS, 500),
    protocols={"lerobot": dict.fromkeys(TASKS, 500), "evo1": dict.fromkeys(TASKS, 400)},
    size={"fast": 96, "exact": 480},
    rendering={"fast": "fast 2", "exact": "exact 1"},  # fast 1 had whole meshes
    protocol="LeRobot 0.6 Meta-World: corner2 camera, first success ends, 500 steps",
)
