"""``python -m scldm_cd4.cli``: the command, for launchers that start a module."""

import sys

from scldm_cd4.cli import main

if __name__ == "__main__":
    sys.exit(main())
