"""`python generate.py`, which is `finermoe generate`: see --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("generate")
