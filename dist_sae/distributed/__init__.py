"""Ranks, process groups, optimizer engines, and detection of lost or hung ranks."""
