"""`python -m finermoe_jax.prepare_data`, the same as `finermoe prepare`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("prepare")
