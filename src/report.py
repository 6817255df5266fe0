"""The command of earlier versions: `runs.py compare` has its work."""

import sys

from runs import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
