"""A run on Kubernetes, the cluster's side of it, and dashboards: rendered, without torch."""
