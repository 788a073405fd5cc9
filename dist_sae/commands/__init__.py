"""The command line: groups of commands with their options."""
