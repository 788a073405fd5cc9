"""Metrics, history and probes of a run."""
