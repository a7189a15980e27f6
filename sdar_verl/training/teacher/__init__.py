"""The privileged teacher: rows, weights, worker group, pass."""
