"""A policy is an assembly: backbone, decoder, rater and normalisation, with a meaning for its actions."""
