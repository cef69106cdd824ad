"""`python -m finermoe_jax.aot`, the same as `finermoe aot`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("aot")
