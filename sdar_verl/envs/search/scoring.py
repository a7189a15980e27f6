"""Exact match, by verl's own function (``verl/utils/reward_score/search_r1_like_qa_em.py``).

Lower case, no punctuation, no articles, white space squeezed; any of the golden answers counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

_FILE = Path("utils", "reward_score", "search_r1_like_qa_em.py")


@functools.cache
def _verls() -> Any:
    # From the file: importing the package would load torch and Ray into every environment process.
    package = util.find_spec("verl")
    if package is None or package.origin is None:
        raise ImportError("exact match is verl's own function, but verl is not installed here: pip install verl")
    spec = util.spec_from_file_location("sdar_verl._verl_qa_em", Path(package.origin).parent / _FILE)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_match(answer: str, golden: Sequence[str]) -> bool:
    """Whether ``answer`` is one of ``golden``, in verl's (SQuAD's) normal form."""
    return bool(_verls().em_check(answer, list(golden)))


def has_content(answer: str) -> bool:
    """Whether the normal form leaves something of ``answer``; an answer of nothing would be equal to the others."""
    return bool(_verls().normalize_answer(answer))
