"""How a chunk of actions becomes tokens of a vocabulary, and back."""
