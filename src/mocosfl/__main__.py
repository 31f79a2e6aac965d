"""``python -m mocosfl``: the same as the command ``mocosfl``."""

import sys

from mocosfl.cli import main

sys.exit(main())
