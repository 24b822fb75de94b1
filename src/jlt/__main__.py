"""`python -m jlt`, and `torchrun -m jlt`."""

import sys

from jlt.cli import main

sys.exit(main())
