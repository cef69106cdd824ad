"""`python train.py`, which is `finermoe train`: see --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("train")
