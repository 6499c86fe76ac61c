"""``python -m sovit.cli``."""

import sys

from sovit.cli import main

if __name__ == "__main__":
    sys.exit(main())
