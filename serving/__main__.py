"""`python -m serving` is `baton`."""

import sys

from serving.cli import main

sys.exit(main())
