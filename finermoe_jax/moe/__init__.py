"""The FineRMoE layer: routing, exchange of rows, expert banks, balance."""
