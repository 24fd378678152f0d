"""``python -m k_subset`` from examples/, or ``python examples/k_subset`` from anywhere."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: the package is then found beside it, not its modules one by one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from k_subset.command import main

if __name__ == "__main__":
    raise SystemExit(main())
