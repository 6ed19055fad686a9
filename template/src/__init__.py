"""The project's own package: data → models → training, with utils below all three."""
