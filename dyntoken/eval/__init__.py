"""Evaluation: exact sums over any number of devices."""
