"""The CPU rollout's sampling: parameters, one sampling step, and the scheduler's exactness and fairness."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sdar_verl.local.sampling import SamplingParams, sample
from sdar_verl.local.scheduler import BatchScheduler
from sdar_verl.local.slot_cache import SlotCache, verify_slot_cache
from tests.support.architectures import random_model
from tests.support.tiny_model import make_tiny_model

EOS = 2  # make_tiny_model's <|im_end|>


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    # Weights three times the usual: the next token depends strongly on what attention sees.
    path = make_tiny_model(tmp_path_factory.mktemp("model"), scale=3.0)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def make_scheduler(model):
    made = []

    def make(**settings):
        made.append(BatchScheduler(settings.pop("model", model), **{"eos_token_ids": [EOS], **settings}))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def params(**given):
    return SamplingParams(**{"max_tokens": 8, "logprobs": True, **given})


def prompt(length, seed=0):
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


@torch.inference_mode()
def plain_log_probs(model, prompt_ids, token_ids, temperature=1.0):
    """Log-probs of ``token_ids`` after ``prompt_ids`` by one pass over the whole sequence, without any cache."""
    logits = model(input_ids=torch.tensor([prompt_ids + token_ids]), use_cache=False).logits[0]
    log_probs = (logits / temperature).log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


# One sampling step.


def test_tokens_follow_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 1000
    uniforms = [(row + 0.5) / rows for row in range(rows)]
    tokens, log_probs = sample(probabilities.log().expand(rows, -1), [params()] * rows, uniforms)
    counts = torch.bincount(tokens, minlength=5) / rows
    torch.testing.assert_close(counts, probabilities, atol=1.5 / rows, rtol=0)
    torch.testing.assert_close(log_probs, probabilities.log()[tokens])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_log_probs_are_taken_at_the_temperature(temperature):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits, [params(temperature=temperature)] * 6, [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    torch.testing.assert_close(log_probs, (logits / temperature).log_softmax(-1)[range(6), tokens])


def test_temperature_zero_takes_the_most_probable_token():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits, [params(temperature=0.0, top_k=1, top_p=0.1)] * 5, [0.0, 0.2, 0.5, 0.8, 0.999])
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).max(-1).values)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"top_k": 2}, {0: 0.625, 1: 0.375}),
        ({"top_k": 1}, {0: 1.0}),
        ({"top_p": 0.5}, {0: 1.0}),
        ({"top_p": 0.51}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.94}, {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}),
        ({"top_k": 3, "top_p": 0.8}, {0: 0.625, 1: 0.375}),
        ({"top_k": 0}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
        ({"top_k": 9, "top_p": 1.0}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
    ],
)
def test_top_k_and_top_p_renormalise_what_they_keep(given, kept):
    order = torch.tensor([2, 0, 3, 1])  # the vocabulary is not sorted by probability
    logits = torch.empty(4).scatter(0, order, torch.tensor([0.5, 0.3, 0.15, 0.05]).log()).expand(400, -1)
    # Every other row keeps everything: truncation is per row.
    rows = [params(**given) if row % 2 == 0 else params() for row in range(400)]
    tokens, log_probs = sample(logits, rows, [(row // 2 + 0.5) / 200 for row in range(400)])
    ranks = {int(token): rank for rank, token in enumerate(order)}
    got = {
        ranks[int(token)]: float(log_prob.exp()) for token, log_prob in zip(tokens[::2], log_probs[::2], strict=True)
    }
    assert got == pytest.approx(kept, rel=1e-5)
    assert {ranks[int(token)] for token in tokens[1::2]} == {0, 1, 2, 3}


def test_no_uniform_draws_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.3, 0.2, 0.1] + [-torch.inf] * 100] * 2)
    tokens, log_probs = sample(logits, [params()] * 2, [0.0, 1.0 - 2**-53])
    assert tokens.tolist() == [1, 3]
    assert log_probs.isfinite().all()


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="diverged"):
        sample(torch.tensor([[0.0, torch.nan]]), [params()], [0.5])


# Reading a request.


def test_a_request_is_read_with_its_limits():
    read = SamplingParams.from_request
    vllm_style = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "logprobs": True, "repetition_penalty": 1.0, "seed": 3}
    assert read(vllm_style, default_max_tokens=30, room=100) == SamplingParams(30, 0.7, 0.9, 20, False, True, 3)
    assert read({"max_tokens": 12}, default_max_tokens=30, room=100).max_tokens == 12
    assert read({"max_new_tokens": 12}, default_max_tokens=30, room=100).max_tokens == 12
    assert read({"max_tokens": 12}, default_max_tokens=30, room=5).max_tokens == 5
    assert read({"max_tokens": 0}, default_max_tokens=30, room=5).max_tokens == 1  # as verl's vLLM server
    assert read({"stop": [], "n": 1}, default_max_tokens=30, room=100).logprobs is False
    assert read({"seed": -1}, default_max_tokens=30, room=100).seed is None  # as vLLM
    asks = [read({"prompt_logprobs": value}, default_max_tokens=30, room=100) for value in (None, False, 0)]
    assert [asked.prompt_logprobs for asked in asks] == [None, None, 0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"stop": ["</action>"]}, "stop="),
        ({"n": 4}, "n=4"),
        ({"temperature": None}, "temperature=None: must be a number"),
        ({"top_k": "many"}, "top_k='many': must be a number"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1: must be a whole number, at least 0"),
        ({"prompt_logprobs": True}, "prompt_logprobs=True: must be a whole number"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"beam_width": 2}, "beam_width=2"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -2}, "top_k=-2"),
    ],
)
def test_what_a_request_cannot_have_is_an_error_that_names_it(given, named):
    with pytest.raises(ValueError, match=named):
        SamplingParams.from_request(given, default_max_tokens=4, room=10)


# The scheduler.


def test_log_probs_equal_a_plain_forward_pass(model, make_scheduler):
    """Mixed lengths and temperatures, requests that join a running batch, fewer slots than requests."""
    scheduler = make_scheduler(max_num_seqs=5, max_num_batched_tokens=150)
    requests = [
        (prompt(length, seed=index), params(max_tokens=limit, temperature=temperature, ignore_eos=True))
        for index, (length, limit, temperature) in enumerate(
            [(1, 9, 1.0), (150, 3, 0.4), (40, 12, 1.7), (41, 1, 1.0), (97, 20, 0.7), (3, 15, 1.0), (130, 8, 0.3)] * 3
        )
    ]
    futures = []
    for request in requests:
        futures.append(scheduler.submit(*request))
        time.sleep(0.003)  # so that some find others under way
    for (prompt_ids, sampling), future in zip(requests, futures, strict=True):
        completion = future.result(timeout=60)
        assert len(completion.token_ids) == sampling.max_tokens
        expected = plain_log_probs(model, prompt_ids, completion.token_ids, sampling.temperature)
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-5, rtol=0)
    counters = scheduler.counters()
    assert counters["requests"] == len(requests)
    assert counters["prompt_tokens"] == sum(len(request[0]) for request in requests)
    assert counters["response_tokens"] == sum(request[1].max_tokens for request in requests)
    assert counters["running"] == counters["waiting"] == 0
    # One by one there would be a decode step for every response token after the first.
    assert counters["decode_steps"] < counters["response_tokens"] - len(requests)


def test_log_probs_of_the_prompt_equal_a_plain_forward_pass(model, make_scheduler):
    """Mixed lengths and temperatures, between requests that do not ask and join a running batch, few slots."""
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=200)
    requests = [
        (prompt(length, seed=index), params(max_tokens=limit, temperature=temperature, ignore_eos=True, **asked))
        for index, (length, limit, temperature, asked) in enumerate(
            [
                (90, 12, 1.0, {}),
                (120, 1, 0.4, {"prompt_logprobs": 0}),
                (7, 1, 1.7, {"prompt_logprobs": 0, "top_k": 3, "top_p": 0.5}),
                (300, 1, 1.0, {"prompt_logprobs": 0}),
                (11, 5, 0.7, {"prompt_logprobs": 0}),
                (64, 1, 0.0, {"prompt_logprobs": 0}),
                (1, 3, 1.0, {"prompt_logprobs": 0}),
                (8, 20, 0.6, {}),
            ]
            * 3
        )
    ]
    futures = []
    for request in requests:
        futures.append(scheduler.submit(*request))
        time.sleep(0.003)
    for (prompt_ids, sampling), future in zip(requests, futures, strict=True):
        completion = future.result(timeout=60)
        assert len(completion.token_ids) == sampling.max_tokens
        if not sampling.truncates:
            expected = plain_log_probs(model, prompt_ids, completion.token_ids, sampling.temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-5, rtol=0)
        if not sampling.scores_prompt:
            assert completion.scored is None
            continue
        expected = plain_log_probs(model, prompt_ids[:1], prompt_ids[1:], sampling.temperature or 1.0)
        assert completion.scored[0] == [[token] for token in prompt_ids[1:]]
        torch.testing.assert_close(torch.tensor(completion.scored[1]).view(-1), expected, atol=1e-5, rtol=0)
    assert scheduler.counters()["prompt_tokens"] == sum(len(request[0]) for request in requests)


def test_greedy_equals_transformers_generate(model, make_scheduler):
    prompts = [prompt(length) for length in (5, 33, 12)]
    scheduler = make_scheduler()
    futures = [scheduler.submit(p, params(temperature=0.0, max_tokens=10, ignore_eos=True)) for p in prompts]
    for prompt_ids, future in zip(prompts, futures, strict=True):
        expected = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=10, eos_token_id=[])
        assert future.result(60).token_ids == expected[0, len(prompt_ids) :].tolist()


def test_a_response_ends_with_its_first_end_of_sequence_token(make_scheduler):
    scheduler = make_scheduler(eos_token_ids=[EOS, *range(10, 60)])  # 51 of 300 tokens: most responses end early
    futures = [scheduler.submit(prompt(9), params(max_tokens=40, seed=seed)) for seed in range(30)]
    ends = {EOS, *range(10, 60)}
    reasons = []
    for future in futures:
        completion = future.result(60)
        reasons.append(completion.finish_reason)
        assert not ends.intersection(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in ends) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == len(completion.log_probs)
    assert reasons.count("stop") > 20
    free = scheduler.submit(prompt(9), params(max_tokens=40, seed=0, ignore_eos=True)).result(60)
    assert free.finish_reason == "length" and len(free.token_ids) == 40


def test_log_probs_come_only_when_asked(make_scheduler):
    assert make_scheduler().submit(prompt(4), params(logprobs=False)).result(60).log_probs is None


def test_a_group_differs_and_a_seed_repeats_in_any_company(make_scheduler):
    scheduler = make_scheduler(seed=7)
    same_prompt = prompt(20)
    group = [f.result(60).token_ids for f in [scheduler.submit(same_prompt, params()) for _ in range(8)]]
    assert len({tuple(tokens) for tokens in group}) == 8
    alone = scheduler.submit(same_prompt, params(seed=5)).result(60).token_ids
    crowd = [scheduler.submit(prompt(30, seed=s), params(max_tokens=20)) for s in range(6)]
    together = scheduler.submit(same_prompt, params(seed=5)).result(60).token_ids
    assert together == alone
    for future in crowd:
        future.result(60)
    again = make_scheduler(seed=7)
    assert [again.submit(same_prompt, params()).result(60).token_ids for _ in range(8)] == group
    other = make_scheduler(seed=8)
    assert other.submit(same_prompt, params()).result(60).token_ids != group[0]


def test_new_weights_are_used_from_the_next_request_on(model, make_scheduler):
    import copy

    changing = copy.deepcopy(model)
    scheduler = make_scheduler(model=changing)
    sampling = params(temperature=0.0, ignore_eos=True)
    before = scheduler.submit(prompt(11), sampling).result(60)

    def change():
        for parameter in changing.parameters():
            parameter.mul_(0.5)

    scheduler.call(change).result(60)
    after = scheduler.submit(prompt(11), sampling).result(60)
    assert before.log_probs != after.log_probs
    expected = plain_log_probs(changing, prompt(11), after.token_ids)
    torch.testing.assert_close(torch.tensor(after.log_probs), expected, atol=1e-5, rtol=0)


class _Gate:
    """A model that stops before every forward pass until told to go on, or to fail."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.entered, self.go, self.error = threading.Semaphore(0), threading.Semaphore(0), None

    def __call__(self, **inputs):
        self.entered.release()
        assert self.go.acquire(timeout=60)
        if self.error is not None:
            raise self.error
        return self.model(**inputs)


def test_a_failing_forward_pass_fails_every_request_and_those_that_follow(model, make_scheduler):
    gate = _Gate(model)
    scheduler = make_scheduler(model=gate, max_num_seqs=2)
    first = scheduler.submit(prompt(5), params())
    gate.entered.acquire(timeout=60)  # first is in its prefill
    others = [scheduler.submit(prompt(6), params()) for _ in range(3)]
    gate.go.release()
    gate.entered.acquire(timeout=60)  # one other joined; the rest wait for a slot
    gate.error = ValueError("broken weights")
    gate.go.release()
    for future in [first, *others]:
        with pytest.raises(RuntimeError, match="broken weights"):
            future.result(timeout=60)
    with pytest.raises(RuntimeError, match="broken weights"):
        scheduler.submit(prompt(5), params())


def test_abort_returns_what_there_is_and_the_scheduler_goes_on(model, make_scheduler):
    gate = _Gate(model)
    scheduler = make_scheduler(model=gate, max_num_seqs=2)
    futures = [scheduler.submit(prompt(5), params(max_tokens=50, ignore_eos=True)) for _ in range(3)]
    for _ in range(6):
        gate.entered.acquire(timeout=60)
        gate.go.release()
    gate.entered.acquire(timeout=60)
    aborted = scheduler.abort_all()
    gate.go.release()
    assert aborted.result(60) == 3
    completions = [future.result(60) for future in futures]
    assert [completion.finish_reason for completion in completions] == ["abort"] * 3
    assert len(completions[0].token_ids) > 2 and completions[2].token_ids == []  # the third never had a slot
    later = scheduler.submit(prompt(5), params(max_tokens=1))
    gate.go.release()
    assert later.result(60).finish_reason == "length"


def test_a_caller_that_goes_away_does_not_stop_the_others(model, make_scheduler):
    gate = _Gate(model)
    scheduler = make_scheduler(model=gate)
    first = scheduler.submit(prompt(5), params(max_tokens=2))
    gate.entered.acquire(timeout=60)
    cancelled, kept = (
        scheduler.submit(prompt(5), params(max_tokens=1)),
        scheduler.submit(prompt(5), params(max_tokens=1)),
    )
    assert cancelled.cancel()
    for _ in range(3):
        gate.go.release()
    assert len(first.result(60).token_ids) == 2
    assert len(kept.result(60).token_ids) == 1
    assert scheduler.counters()["requests"] == 2


def test_closing_fails_what_is_under_way(model):
    gate = _Gate(model)
    scheduler = BatchScheduler(gate, eos_token_ids=[EOS])
    future = scheduler.submit(prompt(5), params())
    gate.entered.acquire(timeout=60)
    gate.go.release()
    gate.entered.acquire(timeout=60)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    gate.go.release()
    closing.join(60)
    with pytest.raises(RuntimeError, match="closed"):
        future.result(60)


def test_an_empty_prompt_is_an_error(make_scheduler):
    with pytest.raises(ValueError, match="empty prompt"):
        make_scheduler().submit([], params())


# The cache.


def test_models_with_sliding_windows_have_no_slots(model):
    import copy

    config = copy.deepcopy(model.config)
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="more than full attention"):
        SlotCache(config)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "qwen3_5_text", "qwen3_moe"])
def test_models_of_every_kind_of_attention_get_the_log_probs_of_plain_passes(make_scheduler, kind):
    """Requests of different lengths join and leave; some want their prompt's log-probs."""
    other = random_model(kind, scale=3.0).eval()
    scheduler = make_scheduler(model=other, max_num_seqs=3)
    prompts = [prompt(length, seed) for seed, length in enumerate((5, 40, 17, 1, 23))]
    futures = [
        scheduler.submit(ids, params(seed=i, max_tokens=4 + 3 * i, prompt_logprobs=0 if i % 2 else None))
        for i, ids in enumerate(prompts)
    ]
    for i, (ids, future) in enumerate(zip(prompts, futures, strict=True)):
        done = future.result(timeout=120)
        torch.testing.assert_close(
            torch.tensor(done.log_probs), plain_log_probs(other, ids, done.token_ids), rtol=1e-3, atol=1e-3
        )
        if i % 2 and len(ids) > 1:
            expected = plain_log_probs(other, ids[:1], ids[1:])
            torch.testing.assert_close(torch.tensor(done.scored[1])[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_a_model_that_the_cache_does_not_serve_is_found_out(model):
    verify_slot_cache(model)

    class IgnoresPositions:
        config = model.config

        def __call__(self, **inputs):
            inputs.pop("position_ids", None)
            return model(**inputs)

    with pytest.raises(ValueError, match="differ from a plain forward pass"):
        verify_slot_cache(IgnoresPositions())
