"""``python -m mocosfl_device``, the same as ``mocosfl-client``."""

import sys

from mocosfl_device.start import main

sys.exit(main())
