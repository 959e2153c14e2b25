"""AsyncVLA: per-token flow clocks, regeneration of what a confidence rater doubts."""
