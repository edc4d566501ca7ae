"""`python -m phinetune`."""

import sys

from phinetune.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
