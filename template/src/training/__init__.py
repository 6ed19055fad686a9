"""A run: its stages, its loop and loss, its checkpoints and what it reports."""
