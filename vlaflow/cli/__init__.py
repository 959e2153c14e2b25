"""One file per command; ``main`` finds the right one. Commands parse, call the rooms below and print, nothing else."""
