"""`python -m finermoe_jax.aot`, which is `finermoe aot`."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("aot")
