"""The command line: thin commands over `kronfac.experiments`."""
