"""The loop, its loss, its checkpoints and what it records."""
