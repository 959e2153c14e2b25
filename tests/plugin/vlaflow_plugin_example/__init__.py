"""Parts for vlaflow that live in a package of their own; docs/extending.md walks through them."""
