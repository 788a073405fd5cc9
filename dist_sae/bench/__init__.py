"""`dist-sae bench`: benchmarks against the limit of the same machine, measured in the same run."""
