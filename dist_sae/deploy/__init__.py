"""A run on Kubernetes: its objects, rendered from the run file, and the cluster's side of it."""
