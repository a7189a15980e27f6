"""The teacher asked from the rollout server during an episode, with a scripted server. No Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdar_verl.local import start_policy
from sdar_verl.rollout import server_teacher
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.rollout.server_teacher import ScoringError, ServerTeacher, scored_response, scoring_params, with_tail
from tests.support.cpu_server import make_server
from tests.support.plain import plain_logits
from tests.support.scripted import GOOD, LOST, Pool, Server, play_episode
from tests.support.tiny_model import make_tiny_model

ON_SERVER = {"teacher__placement": "rollout_server"}


class ScoringServer(Server):
    """Also scores prompts: the log-prob of the token at index i of a request is -i.

    Args:
        tokenizer, script: of :class:`Server`.
        fail: how many scoring requests fail first.
        hold: scoring requests wait until so many answers were sampled.
    """

    def __init__(self, tokenizer, script, *, fail=0, hold=0):
        super().__init__(tokenizer, script)
        self.scored, self.fail, self.hold = [], fail, hold
        self.events = []

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        if "prompt_logprobs" not in sampling_params:
            await asyncio.sleep(0.001)  # a server takes time
            self.events.append("sampled")
            return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params)
        self.scored.append((prompt_ids, sampling_params))
        self.events.append("asked")
        while len(self.requests) < self.hold:
            await asyncio.sleep(0.001)
        if self.fail > 0:
            self.fail -= 1
            raise RuntimeError("the engine is dead")
        await asyncio.sleep(0.001)
        self.events.append("answered")
        return SimpleNamespace(extra_fields=answer(prompt_ids))


def answer(sequence):
    """What verl's servers give for a prompt that is ``sequence``."""
    return {
        "prompt_ids": [[token] for token in [*sequence[1:], 0]],
        "prompt_logprobs": [[float(-i)] for i in [*range(1, len(sequence)), 0]],
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


@pytest.fixture
def play(tokenizer, monkeypatch):
    monkeypatch.setattr(server_teacher, "PAUSE_S", 0.001)

    def run(script, *, server=None, **kwargs):
        server = server or ScoringServer(tokenizer, script)
        return play_episode(monkeypatch, tokenizer, script, server=server, **{**ON_SERVER, **kwargs})

    return run


def positions(prompt, response):
    """The scripted server's log-probs of ``response`` behind ``prompt``."""
    return [float(-i) for i in range(len(prompt), len(prompt) + len(response))]


# ---------------------------------------------------------------- an answer


def test_the_part_about_the_response_is_taken():
    ids, found = scored_response(answer([5, 6, 7, 8, 9]), 3, [8, 9])
    assert ids.tolist() == [[8], [9]] and found.dtype == np.float32 and found.tolist() == [[-3.0], [-4.0]]
    assert scored_response(answer([5, 6]), 1, [6])[1].tolist() == [[-1.0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"global_steps": 3}, "holds no prompt_logprobs"),
        (answer([5, 6, 7, 8]), "5 tokens and answered about 4"),
        (answer([5, 6, 7, 8, 10]), "or about others"),
        ({**answer([5, 6, 7, 8, 9]), "prompt_logprobs": [[0.0]]}, "5 tokens"),
    ],
)
def test_an_answer_about_something_else_is_an_error(fields, words):
    with pytest.raises(ScoringError, match=words):
        scored_response(fields, 3, [8, 9])


def test_only_vllm_is_told_not_to_detokenize():
    """SGLang's sampling parameters have no such name, and refuse what they do not know."""
    assert scoring_params("vllm", 1.0) == {
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": 0,
        "detokenize": False,
    }
    assert scoring_params("sglang", 1.0) == {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


def test_the_likeliest_tokens_come_with_what_is_left_of_1():
    fields = {
        "prompt_ids": [[1, 2], [8, 4], [6, 9], [0, 0]],
        "prompt_logprobs": [[-9, -9], [-0.1, -3], [-0.2, -4], [0, 0]],
    }
    ids, log_probs = scored_response(fields, 2, [8, 9], likeliest=2)
    assert ids.tolist() == [[8, 4], [6, 9]] and ids.dtype == np.int32
    tail = with_tail(log_probs)
    assert tail.dtype == np.float32 and tail[:, :2].tolist() == log_probs.tolist()
    np.testing.assert_allclose(np.exp(tail).sum(axis=-1), 1.0, rtol=1e-6)
    assert with_tail(np.log(np.array([[0.25, 0.75]], np.float32)))[0, -1] == -np.inf
    with pytest.raises(ScoringError, match="asked for 3 tokens at each place and gave 2"):
        scored_response(fields, 2, [8, 9], likeliest=3)


# ---------------------------------------------------------------- an episode


def test_each_row_carries_the_servers_log_probs_of_its_answer(play):
    rows, infos, server, _ = play([LOST, GOOD])
    for row, info in zip(rows, infos, strict=True):
        assert info.teacher_log_probs.tolist() == positions(info.teacher_prompt_ids, row.response_ids)
        assert info.teacher_failure is None
    asked = [prompt_ids for prompt_ids, _ in server.scored]
    for row, info in zip(rows, infos, strict=True):
        assert [*info.teacher_prompt_ids.tolist(), *row.response_ids] in asked
    assert all(params["temperature"] == 0.8 for _, params in server.scored), "the run's, not the request's"


def test_a_turn_is_asked_about_at_once_and_the_next_one_does_not_wait(play, tokenizer):
    """All answers are held back until the third turn was sampled: an episode that waited would never end."""
    server = ScoringServer(tokenizer, [LOST, LOST, GOOD], hold=3)
    _, infos, _, _ = play([LOST, LOST, GOOD], server=server, columns={"session_id": 1})
    assert server.events[:5] == ["sampled", "asked", "sampled", "asked", "sampled"]
    assert [info.teacher_log_probs is not None for info in infos] == [True] * 3
    assert infos[0].episode.teacher_wait_s > 0


def test_the_first_rollout_of_a_task_has_the_students_prompt_scored_too(play):
    rows, infos, server, _ = play([LOST, GOOD])
    assert infos[0].student_log_probs.tolist() == positions(rows[0].prompt_ids, rows[0].response_ids)
    assert infos[1].student_log_probs is None
    assert len(server.scored) == 3
    _, infos, server, _ = play([LOST, GOOD], columns={"session_id": 1})
    assert infos[0].student_log_probs is None and len(server.scored) == 2
    _, infos, server, _ = play([LOST, GOOD], teacher__sanity_check=False)
    assert infos[0].student_log_probs is None and len(server.scored) == 2


def test_a_conversation_is_scored_as_a_whole_when_it_ends(play):
    whole = {"rollout__rows": "trajectory", "rollout__turn_length": 60, "prompt__history_length": 0}
    rows, infos, server, _ = play([LOST, GOOD], max_response_length=300, **whole)
    assert len(rows) == 1
    assert server.events.index("asked") > server.events.index("sampled") + 1, "asked before the last turn"
    assert infos[0].teacher_log_probs.tolist() == positions(infos[0].teacher_prompt_ids, rows[0].response_ids)
    assert infos[0].student_log_probs.tolist() == positions(rows[0].prompt_ids, rows[0].response_ids)
    assert 0 in rows[0].response_mask, "nothing was said in between"


def test_a_failed_request_is_made_again(play, tokenizer):
    server = ScoringServer(tokenizer, [GOOD], fail=2)
    rows, infos, _, _ = play([GOOD], server=server, columns={"session_id": 1})
    assert len(server.scored) == 3
    assert infos[0].teacher_log_probs.tolist() == positions(infos[0].teacher_prompt_ids, rows[0].response_ids)
    assert infos[0].teacher_failure is None


def test_after_the_last_attempt_the_row_says_why_it_has_no_teacher(play, tokenizer):
    server = ScoringServer(tokenizer, [GOOD], fail=server_teacher.ATTEMPTS)
    rows, infos, _, _ = play([GOOD], server=server, columns={"session_id": 1})
    assert len(server.scored) == server_teacher.ATTEMPTS
    assert infos[0].teacher_log_probs is None
    assert infos[0].teacher_failure == "RuntimeError: the engine is dead"
    assert infos[0].error is None and not infos[0].failed
    assert rows[0].response_mask == [1] * len(rows[0].response_ids), "it takes part in RL"


def test_rows_without_a_context_and_validation_are_not_asked_about(play):
    arms = {"student": {"context": "none", "temperature": 0.0}}
    _, infos, server, _ = play([GOOD], columns={"session_id": 1}, skills__retrieval=["none"])
    assert server.scored == [] and infos[0].teacher_log_probs is None and infos[0].teacher_failure is None
    _, infos, server, _ = play([GOOD], validation__arms=arms, columns={"sdar_arm": "student"})
    assert server.scored == [] and infos[0].student_log_probs is None


def test_the_trainers_placement_asks_nobody(play):
    _, infos, server, _ = play([GOOD], teacher__placement="colocated")
    assert server.scored == [] and infos[0].teacher_log_probs is None


def test_requests_of_a_broken_attempt_are_forgotten(play, tokenizer):
    """The environment dies behind the first turn; its request never ends, and nobody waits for it."""
    server = ScoringServer(tokenizer, [GOOD, GOOD], hold=2)
    rows, infos, _, pool = play([GOOD, GOOD], server=server, pool=Pool(dies=1), columns={"session_id": 1})
    assert pool.opened == 2 and len(rows) == 1
    assert infos[0].teacher_log_probs.tolist() == positions(infos[0].teacher_prompt_ids, rows[0].response_ids)


def test_cancelled_requests_end():
    async def main():
        class Never:
            async def generate(self, **_):
                await asyncio.Event().wait()

        scores = ServerTeacher(Never(), "vllm", 1.0)
        info = RowInfo(turn=0, task_type="t", teacher_prompt_ids=np.asarray([1, 2], dtype=np.int32))
        scores.ask(info, [1], [3])
        await asyncio.sleep(0)
        scores.cancel()
        (task,) = scores._tasks
        with pytest.raises(asyncio.CancelledError):
            await task
        return info

    info = asyncio.run(main())
    assert info.teacher_log_probs is None and info.teacher_failure is None


@pytest.mark.parametrize("likeliest", [0, 5, 259])
def test_the_cpu_servers_answers_are_a_plain_forward_passs(tmp_path, likeliest):
    """From the request to the row's record, at the run's temperature, while the server samples for others."""
    model = make_tiny_model(tmp_path, scale=3.0)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    rows = [(list(range(10, 10 + 7 * i)), list(range(100, 103 + i))) for i in range(1, 6)]
    infos = [
        RowInfo(turn=0, task_type="t", teacher_prompt_ids=np.asarray([*range(50, 60), *prompt], dtype=np.int32))
        for prompt, _ in rows
    ]

    async def main():
        server = make_server(model, prompt_length=80, response_length=40, ignore_eos=True)
        await server.update_weights(weights, 0)

        class Client:
            async def generate(self, request_id, *, prompt_ids, sampling_params):
                return await server.generate(prompt_ids, sampling_params, request_id)

        scores = ServerTeacher(Client(), "transformers", 0.6, checks=True, likeliest=likeliest)
        others = [asyncio.create_task(server.generate([5, 6, 7], {}, str(i))) for i in range(3)]
        for info, (prompt, response) in zip(infos, rows, strict=True):
            scores.ask(info, prompt, response)
        await asyncio.gather(scores.collect(), *others)

    asyncio.run(main())

    responses = [torch.tensor(response) for _, response in rows]

    def plain(prompts):
        logits = plain_logits([torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts], responses, model)
        return [(row / 0.6).log_softmax(-1) for row in logits]

    def own(log_probs, response):
        return log_probs.gather(1, response[:, None])[:, 0]

    teacher = plain([info.teacher_prompt_ids for info in infos])
    for info, log_probs, response in zip(infos, teacher, responses, strict=True):
        given = torch.from_numpy(info.teacher_log_probs)
        torch.testing.assert_close(given, own(log_probs, response), atol=1e-5, rtol=0)
        if not likeliest:
            assert info.teacher_support is None
            continue
        ids, support = map(torch.from_numpy, info.teacher_support)
        expected, _ = log_probs.topk(likeliest)
        torch.testing.assert_close(support[:, :-1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(log_probs.gather(1, ids.long()), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(support.exp().sum(-1), torch.ones(len(response)), atol=1e-5, rtol=0)
    expected = own(plain([prompt for prompt, _ in rows])[0], responses[0])
    torch.testing.assert_close(torch.from_numpy(infos[0].student_log_probs), expected, atol=1e-5, rtol=0)
    assert [info.student_log_probs is not None for info in infos] == [True] + [False] * 4
