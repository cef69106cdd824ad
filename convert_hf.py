"""See --help, README.md, and finermoe_jax/commands.py."""

from finermoe_jax.commands import convert_hf

if __name__ == "__main__":
    convert_hf()
