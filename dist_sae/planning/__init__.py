"""Forecasts of a run before it starts: memory, bytes, requests, time, cost, risk."""
