"""Example inputs of a trace, from the user or a configuration, with a cache; and the trace's call signature."""
