"""`python generate.py`, the same as `finermoe generate`. See --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("generate")
