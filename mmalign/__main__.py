"""``python -m mmalign`` is the ``mmalign`` command."""

import sys

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
