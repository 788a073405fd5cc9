"""One training job: how it begins, its loop, its numbers."""
