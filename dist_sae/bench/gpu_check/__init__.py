"""`launch/gpu_check.sh`: what of this project holds on the GPU at hand, in a few minutes.

Every stage is a process with a time limit of its own. Its results are printed as JSON lines as they
come; a table and the exit code say at the end whether all held.
"""
