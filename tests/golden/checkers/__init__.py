"""One module per family of kinds, each with `check(case, ledger)`."""
