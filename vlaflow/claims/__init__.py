"""The claims of the four papers, and what tests them here."""
