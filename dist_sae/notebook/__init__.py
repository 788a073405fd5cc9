"""Runs in a notebook: what `import dist_sae` gives."""
