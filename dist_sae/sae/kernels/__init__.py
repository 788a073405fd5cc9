"""The sparse products: `torch` is what runs, `reference` the dense oracle of the tests."""
