"""Checkpoints of a training run, in the object store."""
