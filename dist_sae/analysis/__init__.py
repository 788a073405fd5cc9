"""Analyses of trained dictionaries: they read index, checkpoint and rows, and return findings."""
