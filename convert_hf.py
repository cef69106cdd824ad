"""See --help, README.md, and finermoe_jax/cli/commands.py."""

from finermoe_jax.cli.commands import convert_hf

if __name__ == "__main__":
    convert_hf()
