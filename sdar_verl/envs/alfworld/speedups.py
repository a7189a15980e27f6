"""Make the stock TextWorld PDDL engine quick enough to train in, without changing a word of what it says.

TextWorld 1.7 spends most of a step parsing the same few grammar templates again, and most of a reset translating the
same PDDL problem four times. :func:`install` replaces what is listed here by equivalents that remember; texts, actions
and outcomes stay the same (``tests/integration/test_alfworld_env.py`` plays games both ways and compares every word).
:func:`uninstall` puts the originals back.

- ``textworld.envs.pddl.textgen._parse_and_convert``: each template is parsed once. Callers get a deep copy of their
  own, because the engine writes into the symbols that it derives from.
- ``textworld.logic._parse_and_convert``: each conjunctive query is parsed once. Nobody writes to its predicates; the
  list around them is copied.
- ``textworld.envs.pddl.logic._parse_and_convert``: each game's grammar is parsed once; its rules are read only.
- ``textworld.envs.pddl.textgen.copy_context``: variables and mapping are copied as dicts, not with everything in them.
  The engine adds keys to these dicts and never edits a value.
- ``fast_downward.pddl2sas``: each problem is translated once and kept compressed. Without ``planner`` the second
  translation, optimised for the planner that takes no part in an episode, is answered with the first: the planner
  reads it just as well but may search for minutes instead of seconds.
- ``fast_downward.interface.DOWNWARD_LIB_PATH``: every environment loads a copy of the engine's library. The copy is
  made from the part that gets loaded (1 of 33 MB, the rest are debug symbols).

All memories are bounded and belong to the process. Not thread-safe, as the engine is not either.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
import weakref
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

# Entries, not bytes. A game uses about 70 templates and 20 queries, mostly shared between games. A translated game
# takes about 0.2 MB (small room) to 1 MB (all receptacles of a floor plan).
MAX_TEMPLATES = 4096
MAX_QUERIES = 1024
MAX_GAMES = 128

_originals: list[tuple[Any, str, Any]] = []


def installed() -> bool:
    """True while the engine is wrapped in this process."""
    return bool(_originals)


def install(*, planner: bool = False) -> None:
    """Wrap the engine in this process; a second call does nothing.

    Args:
        planner: keep the planner's own translation, for callers that ask for walkthroughs or expert commands.

    Raises:
        ImportError: textworld or fast_downward is not installed.
        AttributeError: this TextWorld lacks one of the functions (an unknown version).
    """
    if installed():
        return
    import fast_downward
    import fast_downward.interface as interface
    import textworld.envs.pddl.logic as pddl_logic
    import textworld.envs.pddl.textgen as textgen
    import textworld.logic as logic

    wrappers: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (textgen, "_parse_and_convert", _remember_templates),
        (logic, "_parse_and_convert", _remember_queries),
        (pddl_logic, "_parse_and_convert", _remember_grammars),
        (textgen, "copy_context", _copy_dicts_only),
        (fast_downward, "pddl2sas", functools.partial(_remember_translations, planner=planner)),
        (interface, "DOWNWARD_LIB_PATH", _loaded_part_of_library),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in wrappers]
    for (module, name, original), (_, _, wrap) in zip(originals, wrappers, strict=True):
        setattr(module, name, wrap(original))
    _originals.extend(originals)


def uninstall() -> None:
    """Put the engine's own parts back and forget what was remembered."""
    while _originals:
        module, name, original = _originals.pop()
        setattr(module, name, original)


def _remember_templates(parse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.lru_cache(maxsize=MAX_TEMPLATES)
    def parsed(text: str, rule_name: str) -> Any:
        return parse(text, rule_name=rule_name)

    @functools.wraps(parse)
    def wrapper(text: str, rule_name: str, trace: bool = False) -> Any:
        return parse(text, rule_name=rule_name, trace=True) if trace else deepcopy(parsed(text, rule_name))

    return wrapper


def _remember_queries(parse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.lru_cache(maxsize=MAX_QUERIES)
    def parsed(text: str) -> tuple[Any, ...]:
        return tuple(parse(text, rule_name="conjunctiveQuery"))

    @functools.wraps(parse)
    def wrapper(text: str, rule_name: str) -> Any:
        return list(parsed(text)) if rule_name == "conjunctiveQuery" else parse(text, rule_name=rule_name)

    return wrapper


def _remember_grammars(parse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.lru_cache(maxsize=MAX_GAMES)
    def parsed(text: str, rule_name: str) -> Any:
        return parse(text, rule_name=rule_name)

    return functools.wraps(parse)(parsed)


def _copy_dicts_only(copy_context: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(copy_context)
    def wrapper(context: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": context["state"],
            "facts": context["facts"],
            "variables": dict(context["variables"]),
            "mapping": dict(context["mapping"]),
            "entity_infos": context["entity_infos"],
        }

    return wrapper


def _remember_translations(pddl2sas: Callable[..., Any], *, planner: bool) -> Callable[..., Any]:
    @functools.lru_cache(maxsize=MAX_GAMES * (1 + planner))
    def translated(domain: str, problem: str, optimize: bool) -> tuple[Any, bytes]:
        argv = sys.argv  # the translator sets it
        try:
            task, sas = pddl2sas(domain, problem, optimize=optimize)
        finally:
            sys.argv = argv
        # SAS text is 0.04 to 1.6 MB a game and shrinks sixteenfold; unpacking takes a millisecond.
        return task, zlib.compress(sas.encode("utf-8"), 1)

    @functools.wraps(pddl2sas)
    def wrapper(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
        if verbose:
            return pddl2sas(domain, problem, verbose=True, optimize=optimize)
        task, packed = translated(domain, problem, optimize and planner)
        return task, zlib.decompress(packed).decode("utf-8")

    return wrapper


class _InMemoryFile(str):
    """Path of an anonymous file that vanishes with the last reference to it, or with the process however it ends."""

    @classmethod
    def of(cls, content: bytes) -> _InMemoryFile:
        descriptor = os.memfd_create("libdownward")
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        file = cls(f"/proc/self/fd/{descriptor}")
        weakref.finalize(file, os.close, descriptor)
        return file


def _loaded_part_of_library(path: str) -> str:
    """What a 64-bit little-endian ELF library maps into memory, as a file of its own; else ``path`` as it is."""
    content = Path(path).read_bytes()
    if content[:6] != b"\x7fELF\x02\x01" or not hasattr(os, "memfd_create"):
        return path
    (headers_at,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    end = headers_at + size * count
    for at in range(headers_at, end, size):
        offset, _, _, in_file = struct.unpack_from("<4Q", content, at + 8)
        end = max(end, offset + in_file)
    # Section headers lie behind and are not needed to load the library.
    return _InMemoryFile.of(content[:end])
