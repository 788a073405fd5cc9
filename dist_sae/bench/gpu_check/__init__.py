"""`launch/gpu_check.sh`: checks of this project on the local GPU, in a few minutes.

Each stage is a separate process with its own time limit. Results are printed as JSON lines as they
arrive. At the end, a table and the exit code show whether all checks passed.
"""
