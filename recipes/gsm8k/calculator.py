"""A calculator for verl's ``tool_agent``, named by ``actor_rollout_ref.rollout.multi_turn.function_tool_path``."""

from __future__ import annotations

from verl.tools.function_tool import function_tool


@function_tool
def add(a: int, b: int) -> str:
    """Add two whole numbers.

    Args:
        a: the first.
        b: the second.
    """
    return str(int(a) + int(b))
