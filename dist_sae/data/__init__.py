"""Documents, tokens, units and shards, and the canonical streams of their rows."""
