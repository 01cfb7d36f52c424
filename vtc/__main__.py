"""`python -m vtc`, and `torchrun -m vtc`: the command line."""

import sys

from vtc.cli import main

if __name__ == "__main__":
    sys.exit(main())
