"""The former name of `python -m dyntoken.tools.thresholds`."""

import sys

from dyntoken.tools.thresholds import main

if __name__ == "__main__":
    sys.exit(main())
