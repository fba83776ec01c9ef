"""The command as a module, for launchers: `torchrun -m sfttrain run ...`."""

import os
import sys

# With -m, Python searches the working directory first. No module but this package may be imported
# from there.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from sfttrain.cli.main import main

sys.exit(main())
