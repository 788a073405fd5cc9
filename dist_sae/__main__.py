"""`python -m dist_sae` is `dist-sae`."""

import sys

from dist_sae.cli import main

if __name__ == "__main__":
    sys.exit(main())
