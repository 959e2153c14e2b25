"""Measuring policies: paired rollouts, intervals and tests, latency by part, results.json and the report."""
