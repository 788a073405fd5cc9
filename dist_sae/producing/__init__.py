"""Production of activation sets: text to tokens to activations to shards."""
