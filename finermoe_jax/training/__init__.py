"""A run: what it begins with, its steps, its workdir."""
