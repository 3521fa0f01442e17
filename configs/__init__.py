"""Recipes: `python -m dyntoken.main --config=configs/NAME.py[:arg,key=value]`."""
