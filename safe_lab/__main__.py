"""``python -m safe_lab`` does what ``safe-lab`` does."""

import sys

from safe_lab.cli import main

sys.exit(main())
