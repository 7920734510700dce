"""python -m hmar_jax: the command `hmar`."""

from hmar_jax.cli.main import run

if __name__ == "__main__":
    run()
