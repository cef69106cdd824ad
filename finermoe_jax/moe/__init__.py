"""The mechanism: routing, the exchange of rows, the layer."""
