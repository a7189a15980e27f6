"""What all nodes of the settings have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Node(BaseModel):
    """Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
