"""The golden checker: `python -m tests.golden DIR...` compares the library with recorded official runs."""
