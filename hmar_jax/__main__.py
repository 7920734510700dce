"""python -m hmar_jax: the command `hmar`."""

import sys

from hmar_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
