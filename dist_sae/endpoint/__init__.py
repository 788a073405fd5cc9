"""Language models behind an OpenAI-compatible endpoint: cost first, answers kept.

Nothing is asked unless a command is given the file of an endpoint, and `--yes` to its estimate.
"""
