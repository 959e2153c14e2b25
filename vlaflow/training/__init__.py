"""Training: stages say what is learned, the trainer runs them."""
