"""The conformance checker passes what is sound and, above all, fails what is not."""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces

from vlaflow.cli.check import main
from vlaflow.errors import ConfigError
from vlaflow.simulators.checker import CHECKS, check_environment
from vlaflow.simulators.metaworld import MetaWorldEnv
from vlaflow.simulators.obstacle import ObstacleEnv
from vlaflow.spec import Observation

TASK = "window-close-v3"


def broken_promises(env):
    return [f.promise for f in check_environment(env) if not f.passed]


def test_a_sound_environment_keeps_every_promise():
    """The environments of this library are the reference."""
    findings = check_environment(MetaWorldEnv(TASK, size=32))
    assert [f for f in findings if not f.passed] == []
    assert len(findings) == len(CHECKS) >= 15


class Forgetful(MetaWorldEnv):
    """Carries something over from one episode to the next."""

    episodes = 0

    def restart(self, seed=None):
        Forgetful.episodes += 1
        info = super().restart(seed)
        self._raw[0] += 1e-6 * Forgetful.episodes
        return info


class Eager(MetaWorldEnv):
    """Renders while nobody looks."""

    def advance(self, action):
        out = super().advance(action)
        if out[-1]["steps"] < 20:  # for the test's own sake
            self.render()
        return out


class Disturbed(MetaWorldEnv):
    """Taking an image pushes the hand."""

    def render(self):
        if self._image is None:
            self._sim.data.mocap_pos[0, 0] += 1e-4
        return super().render()


class Careless(MetaWorldEnv):
    """Executes whatever comes."""

    def advance(self, action):
        return super().advance(np.nan_to_num(np.resize(action, 4)))


class Silent(MetaWorldEnv):
    """No instruction, another range than it says, another rate than it says."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.task_description = ""
        first, *rest = self.action_spec.dimensions
        self.action_spec = replace(self.action_spec, dimensions=(replace(first, high=2.0), *rest), rate_hz=20.0)


class Deaf(MetaWorldEnv):
    """Ignores the seed."""

    def restart(self, seed=None):
        return super().restart(1)


class Gambler(MetaWorldEnv):
    """Draws from the generator that belongs to everybody."""

    def advance(self, action):
        np.random.uniform()
        return super().advance(action)


class Unlike(MetaWorldEnv):
    """observe() shows something else than step."""

    def observe(self):
        seen = super().observe()
        return Observation({v: i[::-1] for v, i in seen.images.items()}, seen.state, seen.instruction)


class Late(MetaWorldEnv):
    """Postpones even the moment."""

    def postpone(self):
        return self.observe


class Losing(ObstacleEnv):
    """Terminates where it fails, as gymnasium allows."""

    def advance(self, action):
        reward, terminated, truncated, info = super().advance(action)
        return reward, terminated or truncated, truncated, info


class Fixed(ObstacleEnv):
    """Knows no options of a reset."""

    def restart(self, seed=None):
        return super().restart(seed)


class Hasty(ObstacleEnv):
    """Cuts episodes off sooner than its suite says, and calls its state otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._max_episode_steps = 20
        self.state_names = ("x", "depth")


class Nameless(ObstacleEnv):
    """Has no name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.name


class Upside(ObstacleEnv):
    """Shows itself upside down in videos."""

    def render(self):
        return super().render()[::-1]

    def observe(self):
        return Observation({self.view: super().render()}, self.state, self.task_description)

    def _observation(self):
        return {"pixels": super().render(), "agent_pos": self.state}


class Reusing(ObstacleEnv):
    """Draws every image into the same array, and keeps its state in one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image, self.position = super().render(), np.zeros(2, np.float32)

    def render(self):
        self.image[:] = super().render()
        return self.image

    def observe(self):
        self.position[:] = self.hand
        return Observation({self.view: self.render()}, self.position, self.task_description)

    def _observation(self):
        observation = self.observe()
        return {"pixels": observation.images[self.view], "agent_pos": observation.state}


class Oblong(ObstacleEnv):
    """Has a camera that is wider than high."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space["pixels"] = spaces.Box(0, 255, (24, 32, 3), np.uint8)

    @property
    def views(self):
        return {self.view: (24, 32)}

    def render(self):
        return super().render()[:24]


class Finished(ObstacleEnv):
    """Takes no step after its success, as usual with gymnasium."""

    def advance(self, action):
        out = super().advance(action)
        self._over |= out[1]
        return out


class Brief(ObstacleEnv):
    """Belongs to no suite, is over after four steps, and fails as soon as the hand goes left."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name, self._max_episode_steps = "mine/pass-v0", 4

    def advance(self, action):
        reward, success, truncated, info = super().advance(action)
        self._over = truncated or action[0] < 0
        return reward, success, bool(self._over), info


class Stopped(Brief):
    """Is cut off two steps too soon."""

    def advance(self, action):
        reward, success, _, info = super().advance(np.maximum(action, 0))
        self._over = self._steps >= 2
        return reward, success, self._over, info


class Endless(MetaWorldEnv):
    """Ends later than it says."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._max_episode_steps = 400


@pytest.mark.parametrize(
    ("kind", "promises"),
    [
        (Forgetful, ["The same seed"]),
        (Eager, ["Advancing renders nothing"]),
        (Disturbed, ["Rendering does not change"]),
        (Careless, ["An action of the wrong length"]),
        (Silent, ["The instruction", "The action spec", 'metadata["render_fps"]']),
        (Deaf, ["Different seeds"]),
        (Gambler, ["Nothing draws"]),
        (Unlike, ["observe() returns"]),
        (Late, ["A postponed observation"]),
        (Endless, ["The episode is cut off"]),
        (Losing, ["Success terminates the episode"]),
        (Fixed, ["A reset takes the option"]),
        (Hasty, ["Name, views, state"]),
        (Nameless, ["Name, views, state"]),
        (Upside, ["render() returns the main view"]),
        (Reusing, ["What was observed stays"]),
        (Oblong, ["Images are square"]),
        (Finished, ["A scripted expert keeps"]),
        (Stopped, ["The episode is cut off"]),
    ],
)
def test_a_broken_environment_is_found_out(kind, promises):
    """A checker that cannot fail checks nothing."""
    env = kind(TASK, size=32) if issubclass(kind, MetaWorldEnv) else kind("pass-v0", size=32)
    found = broken_promises(env)
    assert all(any(f.startswith(p) for f in found) for p in promises), found


def test_an_episode_that_soon_ends_is_no_fault():
    """A robot may fall at its first step, and a step may be a whole grasp."""
    assert broken_promises(Brief("pass-v0", size=32)) == []


@pytest.mark.parametrize("action", [[0.0, 1.5], [0.0, np.nan], [1.0]])
def test_an_expert_that_leaves_the_range_of_its_actions_is_found_out(action, monkeypatch):
    """Its labels would be recorded, and the largest of them decide how all are normalised."""
    monkeypatch.setattr("vlaflow.simulators.checker.expert_for", lambda _: lambda env, error=None: np.array(action))
    (finding,) = [f for f in check_environment(ObstacleEnv("pass-v0", size=32)) if not f.passed]
    assert finding.promise.startswith("A scripted expert keeps")
    assert "must return 2 numbers" in finding.observed or "for 'y', which lies in [-1, 1]" in finding.observed


def test_the_command_prints_a_table_and_says_so_by_its_status(capsys, monkeypatch):
    """0 sound, 1 broken."""
    assert main(["env", f"metaworld/{TASK}", "--size", "32"]) == 0
    assert "0 broken" in capsys.readouterr().out
    monkeypatch.setattr("vlaflow.simulators.make", lambda *_, **__: Silent(TASK, size=32))
    assert main(["env", f"metaworld/{TASK}"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_an_unknown_kind_gets_a_hint():
    """Typos are met with the nearest word."""
    with pytest.raises(ConfigError, match="did you mean 'env'"):
        main(["envs", "x"])
