"""Language models behind an OpenAI-compatible endpoint, with cost estimates and a response cache.

No request is sent unless a command has an endpoint file, and `--yes` to accept the estimate.
"""
