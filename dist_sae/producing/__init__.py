"""Text to tokens to activations to shards."""
