"""A command that ends with the process that started it: ``python -m safe_lab.cli.child COMMAND ...``."""

import sys

from safe_lab.child import end_with_parent
from safe_lab.cli import main

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
