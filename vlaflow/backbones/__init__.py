"""Networks that read an observation: images, words and proprioception."""
