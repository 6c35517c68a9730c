"""Where an artifact runs: one file an engine."""
