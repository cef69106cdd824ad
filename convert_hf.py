"""`python convert_hf.py`, the same as `finermoe convert`. See --help and README.md."""

from finermoe_jax.cli.main import run

if __name__ == "__main__":
    run("convert")
