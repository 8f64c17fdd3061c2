"""Circuits: which connections and which heads carry what the tower computes."""
