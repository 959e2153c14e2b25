"""The keys that a corridor's client sends."""

from vlaflow.serving.observation_keys import ObservationKeys

CORRIDOR = ObservationKeys(images=("camera",), state=("position",), prompt="task")
