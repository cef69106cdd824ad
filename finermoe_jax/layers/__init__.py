"""Arrays in, arrays out: the dense parts of a decoder, and how arrays lie on a mesh."""
