"""`python -m finermoe_jax.plot`, the same as `finermoe plot`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("plot")
