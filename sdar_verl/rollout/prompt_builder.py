"""Token ids of the student's and the teacher's prompt: one template, one chat template, each encoded exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sdar_verl.rollout.actions import leaves_thought_open
from sdar_verl.rollout.answers import AnswerReader, shows
from sdar_verl.rollout.control import RESPONSE_TAGS, control_ids_of, disguised
from sdar_verl.rollout.prompts import PromptTemplate, PromptTemplateError

_ANSWER_MARK = "(the sampled answer)"
_QUESTION_MARK = "(the question)"
_MARKED_LINES = 20
SYSTEM_INTRODUCTION = "Know-how for this task:"
"""Line above the context where it stands in a system message."""


class PromptTooLong(ValueError):
    """The prompt does not fit its limit, even after what the chosen policy may drop."""


@dataclass(frozen=True)
class TurnView:
    """What the agent knows before a turn.

    Attributes:
        task: description of the task.
        history: past (observation, action) pairs, oldest first; None where an answer held no action.
        observation: what the environment said last.
        admissible_actions: actions offered in the prompt.
        step: 1-based number of this turn.
        max_steps: turns the episode may have.
    """

    task: str
    history: tuple[tuple[str, str | None], ...]
    observation: str
    admissible_actions: tuple[str, ...]
    step: int
    max_steps: int


class PromptBuilder:
    """Renders a turn into token ids: one user message through the model's chat template.

    The student's prompt is the template with an empty skill slot, the teacher's the same template with the slot
    filled; nothing is decoded and encoded again, so both differ in the skill text only.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        template: of the user message.
        chat_template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        skill_position: ``sdar.prompt.skill_position``. ``system``: a system message that only a prompt with a context
            has (a chat template that writes a default system message of its own writes it in the others). ``front``:
            before the first token of the chat template, outside any role.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        skill_position: Literal["user", "system", "front"] = "user",
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._position = skill_position

    @property
    def action_tags(self) -> tuple[str, ...]:
        """Tags that the template asks the model to put its action in."""
        return self._template.action_tags

    def clean(self, text: str) -> str:
        """``text`` as a slot shows it: control strings in it are broken (``sdar_verl/rollout/control.py``)."""
        return self._template.clean(text)

    @cached_property
    def reader(self) -> AnswerReader:
        """Reads what the model samples."""
        return AnswerReader(self._tokenizer, self.action_tags)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the chat template opens a thought, so that answers begin in it."""
        text = self._apply([{"role": "user", "content": _QUESTION_MARK}], tokenize=False)
        return leaves_thought_open(text.rpartition(_QUESTION_MARK)[2])

    def check(self, *, conversation: bool = False) -> None:
        """Make sure, with this very tokenizer and chat template, that what is written is read and what is put into a
        prompt is in it, and nothing else.

        Args:
            conversation: look at later messages of one conversation, too.

        Raises:
            PromptTemplateError: a tag does not survive the tokenizer; task, observation or context is not in the
                encoded prompt; or see :meth:`check_forging`.
        """
        if lost := self.reader.lost_tags():
            raise PromptTemplateError(
                f"the tokenizer of actor_rollout_ref.model.path cannot write the tags {', '.join(lost)}: encoded and "
                "decoded they are gone, and no answer could be read; use another tokenizer, or a prompt template (and "
                "environment) with other action tags"
            )
        self._check_channels()
        self._check_shown()
        self.check_forging(conversation=conversation)

    def _check_channels(self) -> None:
        """gpt-oss answers in channels, whose marks decoding leaves out: thought and action would be one text."""
        question = {"role": "user", "content": _QUESTION_MARK}
        answer = {"role": "assistant", "content": _ANSWER_MARK}
        opened = self._apply([question], tokenize=False)
        try:
            written, shown, _ = self._apply([question, answer, question], tokenize=False).partition(_ANSWER_MARK)
        except PromptTemplateError:
            return  # a conversation is no concern of every run
        head = written[len(opened) :] if shown and written.startswith(opened) else ""
        ids = self._tokenizer(head, add_special_tokens=False)["input_ids"]
        if self.reader.text(ids).strip() != head.strip():
            raise PromptTemplateError(
                f"the model of actor_rollout_ref.model.path begins its answers with {head.strip()!r}, marks that "
                "decoding leaves out, so that its thoughts could not be told from its action; the text environments do "
                "not support that. Use verl's tool_agent with --config-name sdar_ppo and "
                "actor_rollout_ref.rollout.multi_turn.format=gpt-oss"
            )

    def _check_shown(self) -> None:
        marked = {
            slot: [f"marked {slot}, line {i}" for i in range(_MARKED_LINES)]
            for slot in ("task", "observation", "context")
        }
        task, observation, context = ("\n".join(lines) for lines in marked.values())
        for history in ((), (("earlier", "look"),)):
            turn = TurnView(task, history, observation, ("look",), step=len(history) + 1, max_steps=9)
            ids, without = (self.encode(turn, skills, history) for skills in (context, ""))
            hidden = [slot for slot, lines in marked.items() if not all(shows(self._tokenizer, ids, x) for x in lines)]
            if ids == without and "context" not in hidden:
                hidden.append("context")
            if hidden:
                option = (
                    f"sdar.prompt.skill_position={self._position}: the chat template drops or changes what stands "
                    "there; use sdar.prompt.skill_position=user"
                    if hidden == ["context"] and self._position != "user"
                    else "look at sdar.prompt.template and at the chat template of actor_rollout_ref.model.path"
                )
                raise PromptTemplateError(
                    f"the encoded prompt does not show the whole {' and '.join(hidden)} at turn {turn.step}; {option}"
                )
            for line in self._message(turn, context, history).splitlines():
                if not shows(self._tokenizer, ids, line):
                    raise PromptTemplateError(
                        f"the encoded prompt does not show the line {line.strip()!r} of sdar.prompt.template at turn "
                        f"{turn.step}: the chat template of actor_rollout_ref.model.path changes it (some take /think "
                        "out, and with it </think>); say it in other words, or use another chat template"
                    )

    def check_forging(self, *, conversation: bool = False) -> None:
        """Make sure, with this very tokenizer and chat template, that no slot becomes a control token.

        Args:
            conversation: look at later messages of one conversation, too.

        Raises:
            PromptTemplateError: names the token. That is so where a tokenizer rewrites its text (Unicode's NFKC form,
                say) before it looks for control tokens, or a chat template rewrites its messages.
        """
        control = control_ids_of(self._tokenizer)
        harmless = self._control_ids("x", control, conversation)

        def changed(strings: Sequence[str]) -> Counter[int]:
            found = self._control_ids(disguised(strings), control, conversation)
            return (found - harmless) | (harmless - found)

        strings: Sequence[str] = (*RESPONSE_TAGS, *self._template.control_strings)
        # All in one text, as encoding thousands one by one takes a minute; halved to find one that does it.
        if different := changed(strings):
            while len(strings) > 1:
                halves = strings[: len(strings) // 2], strings[len(strings) // 2 :]
                strings = next((half for half in halves if changed(half)), strings[:1])
            tokens = self._tokenizer.convert_ids_to_tokens(sorted(changed(strings) or different))
            raise PromptTemplateError(
                f"a text that holds a disguised {strings[0]!r} changes the control tokens of a prompt ({tokens}): the "
                "tokenizer or the chat template of actor_rollout_ref.model.path rewrites texts, so that an observation "
                "could forge a turn; use another tokenizer, or one whose added tokens have normalized=false"
            )

    def _control_ids(self, value: str, control: Set[int], conversation: bool) -> Counter[int]:
        # In one slot of each message: the template's own check has looked at every slot.
        turn = TurnView("x", (("x", "x"),), observation=value, admissible_actions=("x",), step=2, max_steps=9)
        ids = self.encode(turn, value, turn.history)
        if conversation:
            ids = [*ids, *self.follow_up(turn, self._tokenizer.eos_token_id)]
        return Counter(i for i in ids if i in control)

    def encode(self, context: TurnView, skills: str, history: Sequence[tuple[str, str | None]]) -> list[int]:
        """Token ids of ``context`` with ``skills`` in the slot and this much ``history``."""
        messages = [{"role": "user", "content": self._message(context, skills, history)}]
        if skills and self._position == "system":
            content = f"{SYSTEM_INTRODUCTION}\n{self._template.clean(skills)}"
            messages.insert(0, {"role": "system", "content": content})
        ids = self._apply(messages, tokenize=True)
        if skills and self._position == "front":
            in_front = self._tokenizer(self._template.clean(skills) + "\n\n", add_special_tokens=False)["input_ids"]
            return [*in_front, *ids]
        return ids

    def _message(self, context: TurnView, skills: str, history: Sequence[tuple[str, str | None]]) -> str:
        return self._template.render(
            task=context.task,
            skills=skills if self._position == "user" else "",
            history=[{"observation": observation, "action": action} for observation, action in history],
            observation=context.observation,
            admissible_actions=list(context.admissible_actions),
            step=context.step,
            max_steps=context.max_steps,
        )

    def follow_up(self, context: TurnView, last_token: int) -> list[int]:
        """Token ids between an answer and the next one in a conversation: what ends the assistant's turn, the new user
        message, and what opens the assistant's next turn.

        They follow the sampled ids, which are never encoded again. The chat template is read off a conversation with a
        marked answer: what it puts behind the mark is the text wanted.

        Args:
            context: the new turn; its history is not shown, the conversation holds it.
            last_token: last id of the answer; where it is the token that ends a turn, the template's is left out.

        Raises:
            PromptTemplateError: the chat template does not show the assistant's words as they are.
        """
        text = self._template.render(
            task=context.task,
            skills="",
            history=[],
            observation=context.observation,
            admissible_actions=list(context.admissible_actions),
            step=context.step,
            max_steps=context.max_steps,
            standalone=False,
        )
        contents = (("user", "-"), ("assistant", _ANSWER_MARK), ("user", text))
        whole = self._apply([{"role": role, "content": content} for role, content in contents], tokenize=False)
        _, found, rest = whole.partition(_ANSWER_MARK)
        if not found:
            raise PromptTemplateError(
                "the model's chat template does not show an assistant's message as it is, so a conversation cannot be "
                "continued token by token; use sdar.rollout.rows=per_turn"
            )
        end = self._tokenizer.convert_ids_to_tokens(last_token)
        if last_token in self._tokenizer.all_special_ids and rest.lstrip().startswith(end):
            rest = rest.lstrip()[len(end) :]
        return list(self._tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])

    def _apply(self, messages: list[dict[str, str]], *, tokenize: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},  # lengths have limits of their own
                **self._chat_template_kwargs,
            )
        except Exception as error:  # no template, a wrong argument for it, or whatever a template of Jinja2 raises
            roles = " and ".join(message["role"] for message in messages)
            remedy = "; use sdar.prompt.skill_position=user" if messages[0]["role"] == "system" else ""
            raise PromptTemplateError(
                f"the model's chat template fails on {roles} messages: {error}{remedy}"
            ) from error

    def fit(
        self, context: TurnView, skills: str, *, limit: int, drop_history: bool, option: str
    ) -> tuple[list[int], int]:
        """Encode ``context`` within ``limit`` tokens.

        Args:
            context: the turn.
            skills: text of the skill slot, empty for the student.
            limit: tokens allowed.
            drop_history: may the oldest (observation, action) pairs be left out?
            option: name of the limit's option, for the error.

        Returns:
            Token ids, and how many history pairs were dropped.

        Raises:
            PromptTooLong: naming the option, the length and the remedy. A prompt is never cut inside.
        """
        for dropped in range(len(context.history) + 1):
            ids = self.encode(context, skills, context.history[dropped:])
            if len(ids) <= limit:
                return ids, dropped
            if not drop_history:
                break
        raise PromptTooLong(
            f"{option}={limit} is too small for a prompt of {len(ids)} tokens at turn {context.step}"
            + (f" (all {len(context.history)} history pairs already dropped)" if drop_history else "")
            + f"; raise {option}, or shorten the skills or the history (sdar.prompt.history_length)"
        )
