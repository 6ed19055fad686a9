"""Load, save and talk to a causal language model."""
