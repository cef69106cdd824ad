"""See --help, README.md, and finermoe_jax/commands.py."""

from finermoe_jax.commands import evaluate

if __name__ == "__main__":
    evaluate()
