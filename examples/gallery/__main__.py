"""``python examples/gallery draw`` or ``python examples/gallery measure``, from a checkout."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: the package is then found beside it, not its modules one by one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # for `benchmarks`

from gallery.command import main

if __name__ == "__main__":
    raise SystemExit(main())
