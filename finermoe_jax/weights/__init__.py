"""A model outside of a program: Hugging Face directories, Orbax checkpoints, upcycling."""
