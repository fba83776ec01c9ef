"""`python -m sfttrain`, for launchers that start a module: torchrun -m sfttrain run ..."""

import sys

from sfttrain.cli import main

sys.exit(main())
