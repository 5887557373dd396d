"""`python -m tessel`: the command line, as the script `tessel`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
