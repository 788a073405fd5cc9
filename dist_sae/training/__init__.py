"""Training: setting up jobs, the training loop, and the metrics of jobs."""
