"""`dist-sae bench`: measurements relative to the limit of the same machine in the same run."""
