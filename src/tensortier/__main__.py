"""``python -m tensortier``."""

import sys

from tensortier.cli import main

sys.exit(main())
