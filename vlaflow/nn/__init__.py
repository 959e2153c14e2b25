"""Plain transformer parts, independent of policies."""
