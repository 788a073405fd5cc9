"""Analyses of trained dictionaries, which read index, checkpoint and rows and return findings."""
