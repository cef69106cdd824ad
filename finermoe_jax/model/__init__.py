"""The decoder: blocks, the loop over layers, losses."""
