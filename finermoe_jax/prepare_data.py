"""`python -m finermoe_jax.prepare_data`, which is `finermoe prepare`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("prepare")
