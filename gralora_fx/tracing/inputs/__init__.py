"""Example inputs of a trace: as a user gives them, as a configuration says, with a cache; and how a trace is called."""
