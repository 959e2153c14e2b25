"""HTML pages made from results with one base template; nothing here runs a policy. Start at ``evaluation``."""
