"""The recipes, one per file, each with its equations first."""
