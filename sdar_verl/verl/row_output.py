"""verl's record of one training row, with columns of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from sdar_verl.verl import symbols

symbols.check("rows")


class RowOutput(AgentLoopOutput):
    """What an agent loop returns for one row; verl stores ``as_dict()`` column by column in its queue.

    Attributes:
        columns: name -> (tokens,) array; each becomes a column beside verl's own, where workers read it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    columns: dict[str, np.ndarray] = Field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """verl's columns and ours."""
        output = super().as_dict()
        output.pop("columns", None)
        return output | {name: torch.from_numpy(values) for name, values in self.columns.items()}
