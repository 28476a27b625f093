"""Example inputs of a trace: from a user or a configuration, with a cache; and its call signature."""
