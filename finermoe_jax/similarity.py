"""`python -m finermoe_jax.similarity`, the same as `finermoe similarity`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("similarity")
