"""Measuring policies: paired rollouts, intervals and tests, latency by part, ``results.json``. Pages are in ``reports``."""
