"""Early stopping: which step was best, and when to give up. The rule is ``policies.early_stop``; ``trainer`` follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlaflow.errors import ConfigError, nearest
from vlaflow.policies.early_stop import EarlyStop


class Best:
    """The best validation of a run so far.

    Args:
        rule: None never stops, and keeps the weights of every checkpoint.

    Attributes:
        step: of the best validation; 0 before the first one.
    """

    def __init__(self, rule: EarlyStop | None) -> None:
        self.rule, self.step = rule, 0
        self._value: float | None = None
        self._waited = 0

    def require(self, held: bool) -> None:
        """Refuse a rule where no samples are held out.

        Raises:
            ConfigError: saying how to leave it out.
        """
        if self.rule is not None and not held:
            raise ConfigError("Early stopping measures held-out episodes, and there are none. Leave it out: --set stop=none.")

    def update(self, step: int, measured: Mapping[str, float]) -> None:
        """Take a validation into account.

        Raises:
            ConfigError: it lacks the rule's measure.
        """
        if self.rule is None:
            return
        if self.rule.measure not in measured:
            raise ConfigError(f"stop.measure is '{self.rule.measure}'; {nearest(self.rule.measure, measured)}")
        value = measured[self.rule.measure]
        if self._value is None or value < self._value:
            self._value, self.step, self._waited = value, step, 0
        else:
            self._waited += 1

    @property
    def over(self) -> bool:
        """Whether the training ends here."""
        return self.rule is not None and self._waited >= self.rule.patience

    @property
    def final(self) -> int | None:
        """Step of the best validation, once the training ended with it; None before."""
        return self.step if self.over else None

    def due(self, step: int) -> bool:
        """Whether the step has to be saved: it is the best, or the end."""
        return self.over or (self.rule is not None and self.step == step)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint keeps the weights of an earlier step."""
        return 0 < self.step < step

    def state(self) -> dict[str, Any]:
        """What a continued run needs, JSON data."""
        return {"value": self._value, "step": self.step, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self._value, self.step, self._waited = state["value"], state["step"], state["waited"]


def kept_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what may change when a run is continued: how often to look and to save.

    How often to look decides when to stop, so with early stopping it may not change.
    """
    free = {"checkpoint_every"} if config.get("stop") else {"checkpoint_every", "validate_every"}
    return {key: value for key, value in config.items() if key not in free}
