"""One recipe per file, equation first."""
