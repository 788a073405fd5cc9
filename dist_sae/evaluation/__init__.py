"""Evaluation of trained dictionaries: `dist-sae evaluate`."""
