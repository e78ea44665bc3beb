"""``python -m fedavg_core.cli``: the command where its script is not on the path."""

import sys

from fedavg_core.cli.command import main

sys.exit(main())
