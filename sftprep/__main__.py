"""`python -m sftprep`."""

import os
import sys

# With -m, Python searches the working directory first; nothing but this package may come from it.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from sftprep.cli import main

if __name__ == "__main__":  # worker processes import the module that started them
    main()
