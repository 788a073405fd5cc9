"""Other tools' formats, a file for each."""
