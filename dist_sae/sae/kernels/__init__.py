"""The sparse products. `torch` is what runs; `reference` is the dense oracle that tests hold it to."""
