"""Forecasts of a run before it is made: memory, bytes, requests, time, cost, risk."""
