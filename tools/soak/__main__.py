"""``python -m tools.soak``: see :mod:`tools.soak`."""

import sys

from tools.soak.command import main

if __name__ == "__main__":
    sys.exit(main())
