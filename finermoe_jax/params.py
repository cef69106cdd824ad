"""`python -m finermoe_jax.params`, the same as `finermoe params`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("params")
