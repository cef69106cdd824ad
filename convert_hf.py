"""`python convert_hf.py`, which is `finermoe convert`: see --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("convert")
