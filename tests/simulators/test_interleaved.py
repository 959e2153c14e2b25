"""Environments of one process share an OpenGL context and must not notice each other."""

import numpy as np

from vlaflow.simulators.base import make


def recorded(env, twin=None):
    env.restart(1000)
    frames = [env.render()]
    if twin:
        twin.restart(1001)
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32):
        env.advance(action)
        if twin:
            twin.advance(action)
            twin.render()
        frames.append(env.render())
    return np.stack(frames)


def test_an_image_does_not_depend_on_what_was_rendered_in_between():
    """Each image is drawn into its own environment's buffer, whichever environment, task and size drew before."""
    env = make("metaworld/drawer-open-v3", size=32)
    alone = recorded(env)
    for name, size in (("metaworld/drawer-open-v3", 64), ("metaworld/window-close-v3", 32)):
        np.testing.assert_array_equal(recorded(env, make(name, size=size)), alone)
