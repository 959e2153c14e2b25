"""The keys that a corridor's client sends."""

from vlaflow.serving.layouts import Layout

CORRIDOR = Layout(images=("camera",), state=("position",), prompt="task")
