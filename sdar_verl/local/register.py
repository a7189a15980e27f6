"""Registers the CPU default."""


def register_local() -> None:
    """Nothing yet."""
