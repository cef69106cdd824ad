"""`python eval.py`, which is `finermoe eval`: see --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("eval")
