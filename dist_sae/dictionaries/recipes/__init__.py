"""The recipes, a file for each, equation first."""
