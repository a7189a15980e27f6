"""A calculator as a tool of verl's, for its tool agent."""

from __future__ import annotations

from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

CONFIG = """\
tools:
  - class_name: tests.support.calculator.Calculator
    config:
      type: native
    tool_schema:
      type: function
      function:
        name: add
        description: Adds two whole numbers.
        parameters:
          type: object
          properties:
            a: {type: string, description: the first}
            b: {type: string, description: the second}
          required: [a, b]
"""


class Calculator(BaseTool):
    """Adds."""

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema):
        super().__init__(config, tool_schema)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[Any, float, dict]:
        try:
            text = str(int(parameters["a"]) + int(parameters["b"]))
        except (KeyError, TypeError, ValueError) as error:
            text = f"cannot add: {error}"
        return ToolResponse(text=text), 0.0, {}
