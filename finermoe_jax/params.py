"""`python -m finermoe_jax.params`, which is `finermoe params`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("params")
