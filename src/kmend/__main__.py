"""``python -m kmend``."""

import sys

from kmend.cli import main

if __name__ == "__main__":
    sys.exit(main())
