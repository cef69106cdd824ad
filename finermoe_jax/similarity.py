"""`python -m finermoe_jax.similarity`, which is `finermoe similarity`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("similarity")
