"""python -m hmar_jax: the command `hmar`."""

import sys

from hmar_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
