"""What the package costs, measured: one command each, ``python -m benchmarks.NAME`` in a checkout (README.md here)."""
