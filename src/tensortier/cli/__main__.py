"""``python -m tensortier.cli``."""

import sys

from tensortier.cli import main

sys.exit(main())
