"""One prompt template per environment, with a slot for the skills that only the teacher sees.

Student and teacher are prompted by the same template: the student's skill slot is empty, the teacher's is filled, and
it lies inside the user turn (arXiv:2605.15155, figures). Slot values come from games, files and models: they are data,
never template code, and cannot open a turn of the chat template nor one of the response tags.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sdar_verl.envs.base import DEFAULT_ACTION_TAGS, TAG_NAME
from sdar_verl.rollout.control import RESPONSE_TAGS, Completions, control_pattern, disguised, joints, neutralise
from sdar_verl.text_files import TextFileError, read_text

TEMPLATES_DIR = Path(__file__).parent / "templates"
# A template that asks for other action tags says so: {% set action_tags = ['search', 'answer'] %}
TAGS_VARIABLE = "action_tags"
SLOTS = ("task", "skills", "history", "observation", "admissible_actions", "step", "max_steps", "standalone")
# A template may leave out the others; without one of these the agent, or its teacher, would be blind.
REQUIRED_SLOTS = ("task", "skills", "observation")


class PromptTemplateError(ValueError):
    """A template that cannot be found, does not parse, or does not show what it has to show."""


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    # The same slots must always give the same prompt.
    del environment.filters["random"]
    del environment.globals["lipsum"]
    return environment


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.suffix == ".jinja" or path.name != name:
        if not path.is_file():
            raise PromptTemplateError(f"prompt template file {name!r} does not exist; shipped: {template_names()}")
        return path
    if name not in template_names():
        raise PromptTemplateError(
            f"unknown prompt template {name!r}; use one of {template_names()} or the path of a .jinja file"
        )
    return TEMPLATES_DIR / f"{name}.jinja"


def _declared_tags(parsed: nodes.Template, path: Path) -> tuple[str, ...]:
    for node in parsed.find_all(nodes.Assign):
        if not (isinstance(node.target, nodes.Name) and node.target.name == TAGS_VARIABLE):
            continue
        try:
            tags = node.node.as_const() if isinstance(node.node, nodes.List | nodes.Tuple) else ()
        except nodes.Impossible:
            tags = ()
        if not tags or not all(isinstance(tag, str) and TAG_NAME.fullmatch(tag) for tag in tags):
            raise PromptTemplateError(
                f"prompt template {path}: {TAGS_VARIABLE} must be a list of tag names, such as ['search', 'answer']"
            )
        return tuple(tags)
    return DEFAULT_ACTION_TAGS


@dataclass(frozen=True)
class PromptTemplate:
    """A compiled template; :meth:`load` makes and checks it.

    Attributes:
        name: shipped name or path, for messages.
        special_tokens: control strings of the policy's tokenizer and chat template that no slot may contain.
        action_tags: tags that the template asks the model to put its action in; no slot may contain them either.
        converses: it reads ``standalone``, so it can also write the later messages of one conversation.
        digest: SHA-256 (hex) of the file's text.
    """

    name: str
    special_tokens: tuple[str, ...]
    action_tags: tuple[str, ...]
    converses: bool
    digest: str
    _template: Template

    @classmethod
    def load(cls, name_or_path: str | Path, special_tokens: Iterable[str] = ()) -> PromptTemplate:
        """Compile a shipped template or a file of the user's.

        Args:
            name_or_path: a shipped name (``alfworld``) or the path of a Jinja2 file.
            special_tokens: see :func:`~sdar_verl.rollout.control.control_strings_of`.
        Raises:
            PromptTemplateError: unknown name, missing or unreadable file, bad syntax, unknown slot, a required slot
                that is not shown, action tags that are none, or a slot that could forge a control string.
        """
        path = _find(name_or_path)
        environment = _environment()
        try:
            source = read_text(path)
            parsed = environment.parse(source)
            slots = meta.find_undeclared_variables(parsed)
            unknown = slots - {*SLOTS, *environment.globals}
            compiled = environment.from_string(source)
        except (TextFileError, TemplateError) as error:
            raise PromptTemplateError(f"prompt template {path}: {error}") from error
        if unknown:
            raise PromptTemplateError(f"prompt template {path}: unknown slots {sorted(unknown)}; known: {list(SLOTS)}")
        template = cls(
            name=str(name_or_path),
            special_tokens=tuple(special_tokens),
            action_tags=_declared_tags(parsed, path),
            converses="standalone" in slots,
            digest=hashlib.sha256(source.encode()).hexdigest(),
            _template=compiled,
        )
        template._check_required_slots()
        template._check_forging()
        return template

    def render(
        self,
        *,
        task: str,
        skills: str,
        history: Sequence[Mapping[str, str | None]],
        observation: str,
        admissible_actions: Sequence[str],
        step: int,
        max_steps: int,
        standalone: bool = True,
    ) -> str:
        """Content of the user message of a turn.

        Args:
            task: what is asked.
            skills: text of the retrieved skills; empty for the student.
            history: the turns to show, oldest first, each with ``observation`` and ``action`` (None: the turn had no
                valid action).
            observation: what the environment answered last.
            admissible_actions: what the environment accepts now; empty when it cannot tell.
            step: number of this turn, from 1.
            max_steps: limit of turns.
            standalone: False for a later message of one conversation, which need not repeat task and skills.
        Raises:
            PromptTemplateError: the template fails on these values.
        """
        clean = self.clean
        turns = [
            {
                "observation": clean(turn["observation"] or ""),
                "action": None if turn["action"] is None else clean(turn["action"]),
            }
            for turn in history
        ]
        return self._write(
            task=clean(task),
            skills=clean(skills),
            history=turns,
            observation=clean(observation),
            admissible_actions=[clean(action) for action in admissible_actions],
            step=step,
            max_steps=max_steps,
            standalone=standalone,
        )

    def _write(self, **clean: Any) -> str:
        try:
            return self._template.render(**clean).strip()
        except Exception as error:  # a user's template can fail in any way Python can
            raise PromptTemplateError(f"prompt template {self.name!r}: {type(error).__name__}: {error}") from error

    def check_rows(self, rows: str) -> None:
        """Raise a :class:`PromptTemplateError` when the template cannot write ``sdar.rollout.rows``."""
        if rows == "trajectory" and not self.converses:
            raise PromptTemplateError(
                f"prompt template {self.name!r} does not read the slot standalone: with sdar.rollout.rows=trajectory "
                "every later message would say everything again; put what belongs into the first message alone between "
                "{% if standalone %} and {% endif %}"
            )

    @functools.cached_property
    def control_strings(self) -> tuple[str, ...]:
        """What no slot may contain, beside the response tags."""
        return (*self.special_tokens, *(f"<{slash}{tag}>" for tag in self.action_tags for slash in ("", "/")))

    def clean(self, text: str) -> str:
        """``text`` with its control tokens and action tags broken (:func:`neutralise`), for text outside the slots."""
        return neutralise(text, self.control_strings)

    def _check_forging(self) -> None:
        """Breaking control strings within slots must be enough: no slot may complete one together with the text beside
        it, and the template may not put one together again."""
        strings = (*RESPONSE_TAGS, *self.control_strings)
        completions = Completions(strings)
        for text in self._filled("\ue000x\ue001"):
            for piece, after_slot, before_slot in joints(text, "\ue000", "\ue001"):
                if string := completions.beside(piece, after_slot, before_slot):
                    raise PromptTemplateError(
                        f"prompt template {self.name!r}: a slot beside the text {piece[-20:]!r} could write {string!r} "
                        "together with it; put a space or a line break between slots, and between slots and brackets"
                    )
        pattern = control_pattern(self.control_strings)
        for harmless, hostile in zip(self._filled("x"), self._filled(disguised(strings)), strict=True):
            forged = Counter(pattern.findall(hostile)) - Counter(pattern.findall(harmless))
            if forged:
                raise PromptTemplateError(
                    f"prompt template {self.name!r} makes {min(forged)!r} of a slot whose control strings were broken "
                    "up; leave out the filter that does so (replace, striptags, ...)"
                )

    def _filled(self, value: str) -> list[str]:
        """Messages of a first, a later and a follow-up turn, with ``value`` in every slot."""
        clean = self.clean(value)
        first: dict[str, Any] = dict.fromkeys(REQUIRED_SLOTS, clean) | {"max_steps": 9, "standalone": True}
        turns = [{"observation": clean, "action": clean}, {"observation": clean, "action": None}]
        texts = [
            self._write(**first, history=history, admissible_actions=actions, step=len(history) + 1)
            for history in ([], turns)
            for actions in ([], [clean, clean])
        ]
        if self.converses:
            later = first | {"standalone": False}
            texts.append(self._write(**later, history=[], admissible_actions=[clean], step=2))
        return texts

    def _check_required_slots(self) -> None:
        """Render a first and a later turn with marked slots: a slot that is named but not shown is found, too."""
        marks: dict[str, Any] = {slot: f"marked {slot}" for slot in REQUIRED_SLOTS}
        histories: list[list[dict[str, str | None]]] = [
            [],
            [{"observation": "earlier", "action": "look"}],
            [{"observation": "earlier", "action": None}],
        ]
        for history in histories:
            step = len(history) + 1
            text = self.render(**marks, history=history, admissible_actions=["look"], step=step, max_steps=2)
            missing = [slot for slot, mark in marks.items() if mark not in text]
            if missing:
                raise PromptTemplateError(
                    f"prompt template {self.name!r} does not show the slots {missing} at step {step}; "
                    f"put {', '.join('{{ ' + slot + ' }}' for slot in missing)} into every turn"
                )
        if self.converses:
            text = self.render(**marks, history=[], admissible_actions=["look"], step=2, max_steps=2, standalone=False)
            if marks["observation"] not in text:
                raise PromptTemplateError(
                    f"prompt template {self.name!r} does not show the observation where standalone is false; "
                    "put {{ observation }} into every turn"
                )
