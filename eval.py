"""See --help, README.md, and finermoe_jax/cli/commands.py."""

from finermoe_jax.cli.commands import evaluate

if __name__ == "__main__":
    evaluate()
