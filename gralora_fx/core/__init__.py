"""The main job: configure, trace, plan, rewrite, train, merge, read and write adapter files."""
