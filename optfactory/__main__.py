"""`python -m optfactory` is the command `optfactory`."""

import sys

from optfactory.cli import main

if __name__ == "__main__":
    sys.exit(main())
