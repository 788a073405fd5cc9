"""Checkpoints of training runs in the object store."""
