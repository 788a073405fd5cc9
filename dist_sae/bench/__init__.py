"""`dist-sae bench`: measured against the limit that the same machine reaches in the same run."""
