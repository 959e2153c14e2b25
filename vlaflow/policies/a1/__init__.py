"""A1: an action expert (or query tokens) over a vision-language backbone, answers at every depth, early exit."""
