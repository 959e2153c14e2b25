"""Demonstrations: the LeRobot format, frame cache, windows, statistics, transforms. No simulator and no network here."""
