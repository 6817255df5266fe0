"""The command of earlier versions: `runs.py list`, `verify` and `show` have its work."""

import sys

from runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
