"""The dense parts of a decoder, and the sharding of arrays on a mesh."""
