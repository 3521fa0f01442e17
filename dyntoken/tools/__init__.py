"""Programs over the library: `python -m dyntoken.tools.NAME --help`."""
