"""Rendering, submission and status of runs on Kubernetes, and Grafana dashboards. No torch."""
