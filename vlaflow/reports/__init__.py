"""Pages a person reads: one base template, filled from results; nothing here runs a policy. Start at ``evaluation``."""
