"""Matches a configuration with the sites of a model: `plan` and `RewritePlan`."""
