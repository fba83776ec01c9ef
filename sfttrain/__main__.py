"""The command as a module, for launchers: `torchrun -m sfttrain run ...`."""

import sys

from sfttrain.cli.main import main

sys.exit(main())
