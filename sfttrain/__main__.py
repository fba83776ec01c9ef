"""`python -m sfttrain`, for launchers that start a module: torchrun -m sfttrain run ..."""

import os
import sys

# With -m, Python searches the working directory first; nothing but this package may come from it.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from sfttrain.cli.main import main

sys.exit(main())
