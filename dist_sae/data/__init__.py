"""Documents, tokens, units, shards and the canonical streams made of them."""
