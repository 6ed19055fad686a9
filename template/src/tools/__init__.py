"""One file for each tool, beside its script. The core imports none, so each can be deleted."""
