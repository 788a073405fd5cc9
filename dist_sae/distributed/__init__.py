"""Ranks, engines and agreed stops."""
