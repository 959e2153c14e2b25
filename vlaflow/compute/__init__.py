"""How much compute to spend on a chunk, decided apart from the decoder that makes it."""
