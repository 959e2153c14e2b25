"""Plain transformer parts. Nothing here knows about images, actions or clocks as a policy uses them."""
