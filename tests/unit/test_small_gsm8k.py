"""GSM8K's recipe for a CPU: problems that verl's reward can read, a policy that can read the worked solution."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from verl.utils.reward_score.gsm8k import compute_score

from sdar_verl.checks.run import check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from tests.support.recipe_run import command_of, write_data
from tests.support.verl_version import IS_VERL_090

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_gsm8k", ROOT / "recipes" / "gsm8k" / "small.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(small: ModuleType) -> Any:
    return small.make_tokenizer()


def test_verls_reward_pays_the_worked_solution_and_nothing_else(small: ModuleType) -> None:
    for row in small.problems(64, 0, "train"):
        truth = row["reward_model"]["ground_truth"]
        assert compute_score(row["extra_info"]["answer"], truth) == 1
        a, b = (int(word) for word in row["prompt"][0]["content"].split() if word.isdigit())
        assert compute_score(small.solution(a, b, a + b + 1), truth) == 0


def test_the_same_seed_gives_the_same_problems_and_splits_differ(small: ModuleType) -> None:
    assert small.problems(20, 0, "train") == small.problems(20, 0, "train")
    questions = [[row["extra_info"]["question"] for row in small.problems(20, *which)]
                 for which in ((0, "train"), (1, "train"), (0, "test"))]  # fmt: skip
    assert questions[0] != questions[1] != questions[2] != questions[0]


def test_every_digit_is_a_token_and_any_text_is_read(small: ModuleType, tokenizer: Any) -> None:
    assert len(tokenizer.encode("1729")) == 4
    for text in (small.question("Ann", "pens", 3, 4), small.solution(9, 9, 18), "Grüße, 你好\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("\n")) == 1, "verl's loops want a newline to be a token"


@pytest.mark.parametrize("tool", [False, True])
def test_lessons_are_right_where_the_policy_is_to_know(small: ModuleType, tokenizer: Any, tool: bool) -> None:
    right: dict[tuple[bool, bool], list[bool]] = {}
    asked: dict[tuple[bool, bool], list[bool]] = {}
    for lesson in itertools.islice(small.lessons(tokenizer, 0, tool), 2000):
        content = lesson.messages[0]["content"]
        a, b = (int(word) for word in content.split("?")[0].split() if word.isdigit())
        case = "####" in content, small.known(a, b)
        asked.setdefault(case, []).append(len(lesson.turns) > 1)
        if not asked[case][-1]:
            right.setdefault(case, []).append(lesson.turns[-1] == ("assistant", small.solution(a, b, a + b)))
        else:
            assert lesson.turns[1] == ("tool", str(a + b)) and lesson.turns[2][1] == small.solution(a, b, a + b)
    shares = {case: sum(found) / len(found) for case, found in right.items()}
    assert shares[True, True] == shares[True, False] == shares[False, True] == 1
    assert shares[False, False] == pytest.approx(1 / (2 * small.NEAR + 1), abs=0.08)
    calls = {case: sum(found) / len(found) for case, found in asked.items()}
    assert calls[True, True] == calls[True, False] == calls[False, True] == 0
    assert calls[False, False] == pytest.approx(small.ASKS if tool else 0, abs=0.08)


def test_only_answers_are_learnt_and_a_few_batches_lower_the_loss(small: ModuleType, tokenizer: Any) -> None:
    rows = list(itertools.islice(small.lessons(tokenizer, 1), 8))
    batch = small.collate(tokenizer, rows)
    for row, lesson in enumerate(rows):
        learnt = batch["labels"][row][batch["labels"][row] != -100]
        assert tokenizer.decode(learnt) == lesson.turns[0][1] + tokenizer.eos_token
    losses = []
    for steps in (2, 30):
        model = small.warm_start(tokenizer, steps, 8, 0)
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert losses[1] < 0.7 * losses[0]


def test_a_call_is_learnt_in_the_tokens_that_verls_tool_agent_makes(small: ModuleType) -> None:
    """verl's own parser reads the call, and its own tokenisation of the answer is what the policy has seen."""
    builders = pytest.importorskip("verl.utils.tokenizer.continuous_token")
    from verl.experimental.agent_loop.tool_parser import HermesToolParser

    tokenizer, schema = small.make_tokenizer(tool=True), small.schema()
    lesson = next(row for row in small.lessons(tokenizer, 0, True) if len(row.turns) == 3)
    (_, asked), (_, told), (_, answer) = lesson.turns
    call = [*tokenizer.encode(asked), tokenizer.eos_token_id]
    _, (found,) = asyncio.run(HermesToolParser(tokenizer).extract_tool_calls(call))
    assert found.name == schema["function"]["name"] and str(sum(json.loads(found.arguments).values())) == told
    assistant = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    before = [*lesson.messages, assistant]
    builder = builders.QwenContinuousTokenBuilder(tokenizer)
    prompt = tokenizer.apply_chat_template(
        lesson.messages, tools=[schema], add_generation_prompt=True, return_dict=False
    )
    merge = builder.merge_non_assistant_tokens if IS_VERL_090 else builder.merge_context_tokens
    merged = merge(before, [*before, {"role": "tool", "content": told}], [*prompt, *call], tools=[schema])
    batch = small.collate(tokenizer, [lesson], tool=True)
    said = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    assert batch["input_ids"][0].tolist() == [*merged.token_ids, *said]
    learnt = batch["labels"][0]
    assert learnt[learnt != -100].tolist() == [*call, *said]


@pytest.mark.parametrize(("script", "tool"), [("small.sh", False), ("small_tool.sh", True)])
def test_the_scripts_pass_all_checks(
    small: ModuleType, script: str, tool: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my runs #1 (a=b), [x]"
    data, tokenizer = out / "data", small.make_tokenizer(tool)
    data.mkdir(parents=True)
    for split in ("train", "test"):
        write_data(data, small.problems(16, 0, split), split)
    small.warm_start(tokenizer, 1, 2, 0, tool).save_pretrained(data / "policy")
    tokenizer.save_pretrained(data / "policy")
    monkeypatch.setenv("SDAR_OUT", str(out))
    monkeypatch.setenv("SDAR_VENV", str(tmp_path / "none"))
    command = command_of(ROOT / "recipes" / "gsm8k" / script, tmp_path, "method=revkl_frozen")
    assert command[:4] == ["-m", "verl.trainer.main_ppo", "--config-name", "sdar_ppo"]
    config = compose_config("sdar_ppo", command[4:])
    assert config.sdar.method == "revkl_frozen"
    loop = config.actor_rollout_ref.rollout.agent.default_agent_loop
    assert loop == ("tool_agent" if tool else "single_turn_agent")
    check_run(config, load_config(config.sdar))
