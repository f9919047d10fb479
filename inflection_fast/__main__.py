"""`python -m inflection_fast` is `inflection-fast`."""

import sys

from inflection_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
