"""How much of the household a policy knows by heart: the noise-free measure of internalisation.

In its first thought the quick start's policy names the target and where it will look: ``<think> apple in fridge
</think>``. The probe gives it the first prompt of a game *without* a skill and the beginning ``<think> apple in``, and
reads off the probability of the usual place. Nothing is sampled. A policy that knows nothing is at about one over the
number of receptacle types in the room; one that has taken its teacher's knowledge into its weights comes near 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdar_verl.envs.base import Task, TextEnv
    from sdar_verl.rollout.prompts import PromptTemplate


@dataclass(frozen=True)
class FirstTurn:
    """What the policy is shown before its first action, and what the probe asks.

    Attributes:
        task: description of the task.
        observation: the environment's first observation.
        admissible_actions: what it accepts at the start.
        target: object type asked for, as the policy writes it (``apple``).
        usual_place: receptacle type where the household keeps it (``fridge``).
        skills: text of the skill slot; empty for the student.
    """

    task: str
    observation: str
    admissible_actions: tuple[str, ...]
    target: str
    usual_place: str
    skills: str = ""


def first_turns(tasks: Sequence[Task], environment: TextEnv) -> list[FirstTurn]:
    """The first turn of each task, as the environment itself shows it.

    Args:
        tasks: of generated games; the ``traj_data.json`` beside their ``data["game_file"]`` tells the usual place.
        environment: the run's own kind of environment.

    Raises:
        ValueError: a task whose game does not say where its target usually lies, such as one of ALFWorld's download.
    """
    turns = []
    for task in tasks:
        trajectory = json.loads((Path(str(task.data["game_file"])).parent / "traj_data.json").read_text())
        if "sdar" not in trajectory:
            raise ValueError(
                f"{task.data['game_file']} was not made by sdar_verl's generator: no usual place is known for its "
                "target, so the internalisation probe has nothing to ask; leave it out or use generated games"
            )
        start = environment.reset(task)
        turns.append(
            FirstTurn(
                task=task.description,
                observation=start.observation,
                admissible_actions=start.admissible_actions,
                target=trajectory["pddl_params"]["object_target"].lower(),
                usual_place=trajectory["sdar"]["usual_place"].lower(),
            )
        )
    return turns


def internalisation(
    model: Any,
    tokenizer: Any,
    turns: Sequence[FirstTurn],
    template: PromptTemplate,
    *,
    max_steps: int,
    batch_size: int = 64,
) -> float:
    """Mean probability of the usual place as the word after ``<think> {target} in``.

    Args:
        model: a causal language model, or the path of a checkpoint (loaded in float32 on the CPU).
        tokenizer: its tokenizer, or a path.
        turns: first turns of a panel's games.
        template: the prompt template of the run.
        max_steps: the run's limit of turns (a slot of the template).
        batch_size: prompts per forward pass.

    Returns:
        A probability: the product over the place's tokens where it has several, averaged over ``turns``.

    Raises:
        ValueError: no turns, or a word that the tokenizer does not know.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not turns:
        raise ValueError("the probe needs at least one game")
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if isinstance(model, str | Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    questions = [_question(tokenizer, template, turn, max_steps) for turn in turns]
    # like lengths together: less padding
    questions.sort(key=lambda question: len(question[0]) + len(question[1]))
    training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.no_grad():
            for start in range(0, len(questions), batch_size):
                total += _answer_probabilities(model, questions[start : start + batch_size]).double().sum().item()
    finally:
        model.train(training)
    return total / len(questions)


def _question(tokenizer: Any, template: PromptTemplate, turn: FirstTurn, max_steps: int) -> tuple[list[int], list[int]]:
    """Token ids up to ``in``, and those of the place."""
    content = template.render(
        task=turn.task,
        skills=turn.skills,
        history=[],
        observation=turn.observation,
        admissible_actions=turn.admissible_actions,
        step=1,
        max_steps=max_steps,
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    beginning = f"<think> {turn.target} in"
    begun = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{beginning} {turn.usual_place}", add_special_tokens=False)["input_ids"]
    if whole[: len(begun)] != begun or len(whole) == len(begun) or tokenizer.unk_token_id in whole:
        raise ValueError(
            f"the tokenizer cannot ask for {turn.target!r} in {turn.usual_place!r}: a word is unknown to it, or it "
            "joins words; the probe is for the quick start's policy"
        )
    return [*prompt, *begun], whole[len(begun) :]


def _answer_probabilities(model: Any, questions: Sequence[tuple[list[int], list[int]]]) -> Any:
    """Probability of each answer after its question; shape (questions,)."""
    import torch

    width = max(len(question) + len(answer) for question, answer in questions)
    rows = [[*question, *answer] for question, answer in questions]
    device = next(model.parameters()).device
    # padded on the right: under the causal mask nothing before the padding sees it
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    answers = torch.zeros_like(log_probs)
    for i, (question, answer) in enumerate(questions):
        answers[i, len(question) - 1 : len(question) + len(answer) - 1] = 1.0
    return (log_probs * answers).sum(-1).exp()
