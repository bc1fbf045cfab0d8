"""Rules that a module must pass before it may exist."""
