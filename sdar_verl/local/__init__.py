"""The embedded default: what lets the recipes run on a machine without a GPU, with a small policy of our own."""

from __future__ import annotations

from pathlib import Path


def start_policy() -> str:
    """Folder of the shipped start policy: a Hugging Face checkpoint with its tokenizer (about 1 MB)."""
    return str(Path(__file__).parent / "policy")
