"""`python -m finermoe_jax COMMAND …`, the same as `finermoe COMMAND …`."""

from finermoe_jax.cli.main import main

if __name__ == "__main__":
    main()
