"""Rules with options, rules that learn, budgets, and what a third party's rule may do wrong."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.compose import compose_config
from sdar_verl.config import SdarConfig, SkillsConfig, load_config
from sdar_verl.envs.base import Task
from sdar_verl.observe import observers
from sdar_verl.observe.skill_statistics import SkillStatistics, learns
from sdar_verl.rollout.rows import EVIDENCE_COLUMN, EpisodeNote, RowInfo
from sdar_verl.skills import registry
from sdar_verl.skills.bank import Skill, SkillBank
from sdar_verl.skills.retrieval import RetrievalError, check_rules, fit_budget, register_retriever, retrieve
from sdar_verl.skills.ucb import Evidence, TypeStatistics
from sdar_verl.table import StepTable
from tests.support.table import make_table

BANK = SkillBank(
    [
        Skill("lamp", "light", "switch the lamp on", keywords=("lamp",)),
        Skill("manners", "", "be kind"),
        Skill("oven", "heat food", "bake bread in the oven", task_types=("bake",)),
        Skill("tap", "water", "wash a plate under the tap", task_types=("wash",)),
    ]
)


def test_a_keyword_in_a_script_without_spaces_is_found_within_a_sentence() -> None:
    bank = SkillBank([Skill("a", "", "x", keywords=("北京",)), Skill("b", "", "x", keywords=("東京", "ホテル"))])
    for description, found in (("去北京的酒店", ["a"]), ("東京のホテル", ["b"]), ("去上海的酒店", [])):
        assert list(retrieve(bank, task(description), "keyword").names) == found


def task(description: str = "", task_type: str = "bake", task_id: str = "t") -> Task:
    return Task("kitchen", task_id, task_type, description)


def known(queries: int, **supplied: tuple[int, float]) -> TypeStatistics:
    """Skill -> (times supplied, sum of rewards)."""
    return TypeStatistics(queries, {k: n for k, (n, _) in supplied.items()}, {k: r for k, (_, r) in supplied.items()})


def picked(evidence: Evidence | None, **options) -> tuple[str, ...]:
    return retrieve(BANK, task("", "x"), "ucb", options={"ucb": options} if options else None, evidence=evidence).names


# ---------------------------------------------------------------- options


def test_options_are_checked_by_rule_and_name() -> None:
    with pytest.raises(RetrievalError, match=r"'ucb' has no option 'cc'; known: c, top, cold_start, prior, candidates"):
        check_rules(["ucb"], {"ucb": {"cc": 1}})
    with pytest.raises(RetrievalError, match=r"'keyword' has no option 'c'; known: none"):
        check_rules(["keyword"], {"keyword": {"c": 1}})
    with pytest.raises(RetrievalError, match=r"sdar\.skills\.options\.ucb has no effect"):
        check_rules(["keyword"], {"ucb": {"c": 1}})
    with pytest.raises(RetrievalError, match=r"embedding\.top='3': input should be a valid integer"):
        check_rules(["embedding"], {"embedding": {"top": "3"}})
    with pytest.raises(RetrievalError, match="has no option 'evidence'"):
        check_rules(["ucb"], {"ucb": {"evidence": 1}})
    assert check_rules(["ucb"], {"ucb": {"c": 1}}) == ["ucb"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": -1}, r"ucb\.c=-1"),
        ({"top": 0}, r"ucb\.top=0"),
        ({"c": "2"}, r"ucb\.c='2': input should be a valid number"),
        ({"c": math.nan}, r"ucb\.c=nan"),
        ({"top": True}, r"ucb\.top=True"),
        ({"cold_start": "last"}, "cold_start='last': input should be 'first' or 'prior'"),
        ({"candidates": "few"}, "candidates='few'"),
        ({"prior": 1.0}, "prior=1.0 has no effect with cold_start=first"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(RetrievalError, match=message):
        picked(None, **options)


# ---------------------------------------------------------------- third parties


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))


def test_a_rule_that_fails_is_named(rules: None) -> None:
    @register_retriever("mine")
    def mine(bank, task, seed, *, strength=1):
        return [bank.no_such_thing]

    with pytest.raises(RetrievalError, match="rule 'mine' failed on task 't': AttributeError"):
        retrieve(BANK, task(), "mine")


def test_a_rule_that_gives_nothing_at_all_is_named(rules: None) -> None:
    register_retriever("nothing")(lambda bank, task, seed: None)
    with pytest.raises(RetrievalError, match="rule 'nothing' failed on task 't': TypeError"):
        retrieve(BANK, task(), "nothing")


def test_a_rule_that_gives_names_is_told_to_give_skills(rules: None) -> None:
    register_retriever("names")(lambda bank, task, seed: ["oven"])
    with pytest.raises(RetrievalError, match="rule 'names' gave str; it must give skills"):
        retrieve(BANK, task(), "names")


def test_a_rule_takes_its_options(rules: None) -> None:
    @register_retriever("first")
    def first(bank, task, seed, *, count=1):
        return list(bank)[:count]

    assert retrieve(BANK, task(), "first", options={"first": {"count": 3}}).names == ("lamp", "oven", "manners")


# ---------------------------------------------------------------- oracle


def test_oracle_shows_the_tasks_own_solution() -> None:
    solved = Task("kitchen", "t", "bake", "bake", {"demonstration": ["open oven", "put bread in oven"]})
    found = retrieve(BANK, solved, "oracle")
    assert found.names == ("oracle",) and not found.no_match
    assert "1. open oven\n2. put bread in oven" in found.skills[0].text


def test_oracle_without_a_solution_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdar_verl.context.builtin.demonstration_of", lambda task: ())
    found = retrieve(BANK, task(), "oracle")
    assert found.skills == () and found.no_match


# ---------------------------------------------------------------- BM25


def test_bm25_ranks_by_shared_words() -> None:
    pytest.importorskip("bm25s")
    assert retrieve(BANK, task("bread from the oven"), "embedding").names == ("oven", "manners")
    assert set(retrieve(BANK, task("an oven and a lamp"), "embedding").names) == {"oven", "lamp", "manners"}
    one = {"embedding": {"top": 1}}
    assert retrieve(BANK, task("a plate to wash"), "embedding", options=one).names == ("tap", "manners")
    nothing = retrieve(BANK, task("xylophone"), "embedding")
    assert nothing.names == ("manners",) and nothing.no_match
    assert retrieve(BANK, task(""), "embedding").names == ("manners",)


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RetrievalError, match=r"sdar-verl\[embedding\]|cannot load it"):
        retrieve(BANK, task("x"), "embedding", options={"embedding": {"model": "/no/such/model"}})
    with pytest.raises(RetrievalError, match=r"embedding\.top=0"):
        retrieve(BANK, task("x"), "embedding", options={"embedding": {"top": 0}})


# ---------------------------------------------------------------- budget


def words(text: str) -> int:
    return len(text.split())


def test_a_budget_drops_whole_skills_from_the_end() -> None:
    found = retrieve(BANK, task("lamp"), ["keyword", "task_type"])
    assert found.names == ("lamp", "oven", "manners")  # 4, 5 and 2 words
    for limit, names in (
        (11, ("lamp", "oven", "manners")),
        (10, ("lamp", "oven")),
        (9, ("lamp", "oven")),
        (8, ("lamp",)),
    ):
        kept = fit_budget(found, limit, words)
        assert kept.names == names
        assert [skill.name for skill in kept.dropped] == list(found.names[len(names) :])
    with pytest.raises(RetrievalError, match=r"max_tokens=3 is less than the 4 tokens of skill 'lamp'"):
        fit_budget(found, 3, words)


# ---------------------------------------------------------------- ucb


def test_ucb_takes_the_highest_upper_bound() -> None:
    # N = 10: lamp 4/5 + sqrt(ln 10 / 5), oven 3/3 + sqrt(ln 10 / 3), tap 0/2 + sqrt(ln 10 / 2)
    statistics = known(10, lamp=(5, 4.0), oven=(3, 3.0), tap=(2, 0.0))
    assert picked(Evidence(statistics)) == ("oven", "manners")
    assert picked(Evidence(statistics), c=10.0) == ("tap", "manners")
    assert picked(Evidence(statistics), c=0.0, top=2) == ("oven", "lamp", "manners")


@given(
    counts=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 9)), min_size=3, max_size=3),
    c=st.floats(0, 5),
    queries=st.integers(1, 99),
)
def test_ucb_is_the_papers_score(counts, c, queries) -> None:
    names = ("lamp", "oven", "tap")
    statistics = known(queries, **dict(zip(names, counts, strict=True)))
    scores = {n: r / k + c * math.sqrt(math.log(queries) / k) for n, (k, r) in zip(names, counts, strict=True)}
    assert scores[picked(Evidence(statistics), c=c)[0]] == pytest.approx(max(scores.values()))


def test_skills_that_were_never_supplied_come_first_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> list[str]:
        return [
            retrieve(BANK, task("", "x"), "ucb", seed, evidence=Evidence(ahead=ahead)).names[0] for ahead in range(3)
        ]

    assert sorted(order(0)) == ["lamp", "oven", "tap"]
    assert len({tuple(order(seed)) for seed in range(20)}) > 1
    assert picked(Evidence(known(5, lamp=(5, 50.0), tap=(1, 0.0)))) == ("oven", "manners")


def test_with_a_prior_the_choices_of_a_first_step_are_spread() -> None:
    chosen = [picked(Evidence(ahead=ahead), cold_start="prior")[0] for ahead in range(9)]
    assert all(len(set(chosen[at : at + 3])) == 3 for at in (0, 3, 6))


def test_or_have_one_observation_more_of_the_prior() -> None:
    # Of the prior 3: lamp (2 + 3) / 3, oven 3 / 3, tap 3; of 0: lamp 2 / 3.
    statistics = known(4, lamp=(2, 2.0), oven=(2, 0.0))
    scores = {"lamp": (5 / 3, 3), "oven": (1.0, 3), "tap": (3.0, 1)}
    best = max(scores, key=lambda name: scores[name][0] + math.sqrt(math.log(4 + 3) / scores[name][1]))
    assert picked(Evidence(statistics), cold_start="prior", prior=3.0)[0] == best == "tap"
    assert picked(Evidence(statistics), c=0.0, cold_start="prior") == ("lamp", "manners")
    assert picked(Evidence(statistics), c=0.0, cold_start="prior", prior=1.5) == ("tap", "manners")


def test_validation_takes_the_best_mean() -> None:
    statistics = known(99, lamp=(50, 40.0), oven=(1, 0.5))
    assert picked(Evidence(statistics, explore=False), c=99.0) == ("lamp", "manners")


def test_tasks_of_a_step_do_not_all_get_one_skill() -> None:
    statistics = known(30, lamp=(10, 5.0), oven=(10, 5.0), tap=(10, 5.0))
    chosen = [picked(Evidence(statistics, ahead=ahead))[0] for ahead in range(9)]
    assert {name: chosen.count(name) for name in chosen} == {"lamp": 3, "oven": 3, "tap": 3}


def test_matching_candidates_only() -> None:
    found = retrieve(BANK, task("lamp", "bake"), "ucb", options={"ucb": {"candidates": "matching", "top": 9}})
    assert sorted(found.names) == ["lamp", "manners", "oven"]


def test_ucb_finds_the_skill_that_pays() -> None:
    """Brute force: 300 tasks of a world where one skill wins more often."""
    chance, rng, statistics, late = {"lamp": 0.2, "oven": 0.7, "tap": 0.3}, random.Random(0), TypeStatistics(), []
    for step in range(300):
        name = picked(Evidence(statistics))[0]
        statistics.add([name], float(rng.random() < chance[name]))
        late += [name] if step >= 200 else []
    assert statistics.queries == 300 == sum(statistics.supplied.values())
    assert late.count("oven") > 60


# ---------------------------------------------------------------- the trainer's part


def settings(**skills) -> SdarConfig:
    return SdarConfig(skills=SkillsConfig(**skills))


def step_rows(rewards: dict[str, list[float]], skills: tuple[str, ...], task_type: str = "bake") -> StepTable:
    """One task per entry, an episode of two rows per reward; verl's padding row at the end."""
    keys, infos = [], []
    for uid, group in rewards.items():
        for session, reward in enumerate(group):
            for turn in range(2):
                note = EpisodeNote({}, reward=reward) if turn == 0 else None
                keys.append(f"{uid}_{session}_{turn}")
                infos.append(RowInfo(turn, task_type, skills=skills, episode=note))
    return make_table([*keys, "pad_0_0"], [*infos, None])


def test_only_rules_that_learn_bring_the_part(tmp_path) -> None:
    assert learns(settings(retrieval=["ucb"])) and not learns(settings(retrieval=["keyword"]))
    folder = f"trainer.default_local_dir={tmp_path}"
    config = compose_config("sdar_quickstart", [folder, "sdar.skills.retrieval=[keyword,ucb]"])
    assert observers(load_config(config.sdar), config, None)[0].name == "skill_statistics"


def test_a_task_counts_once_with_its_episodes_mean_reward() -> None:
    part = SkillStatistics(settings())
    part.after_updates(step_rows({"a": [1.0, 0.0], "b": [1.0, 1.0]}, ("oven", "manners")), {})
    part.after_updates(step_rows({"c": [0.0]}, ("tap",)), {})
    part.after_updates(step_rows({"d": [5.0]}, (), "wash"), {})
    state = part.state_dict()["by_type"]
    assert state == {"bake": {"queries": 3, "supplied": {"oven": 2, "manners": 2, "tap": 1},
                              "reward": {"oven": 1.5, "manners": 1.5, "tap": 0.0}}}  # fmt: skip


@pytest.mark.parametrize("shown", [(), (0,), (2,)])
def test_a_task_counts_whichever_of_its_episodes_the_teacher_looks_at(shown) -> None:
    rows = step_rows({"a": [1.0, 0.0]}, ())
    for at, info in enumerate(rows.infos[:4]):
        if info.episode is not None:
            info.episode.passages = {"skills": {"skills": ["oven"]}, "contrast/skills": {"skills": ["tap"]}}
        info.skills = ("oven",) if at in shown else ()
    part = SkillStatistics(settings())
    part.after_updates(rows, {})
    assert part.state_dict()["by_type"]["bake"] == {"queries": 1, "supplied": {"oven": 1}, "reward": {"oven": 0.5}}


def test_failed_episodes_do_not_count() -> None:
    part, rows = SkillStatistics(settings()), step_rows({"a": [1.0], "b": [0.0]}, ("oven",))
    for info in rows.infos[:2]:
        info.failed = True
    part.after_updates(rows, {})
    assert part.state_dict()["by_type"]["bake"] == {"queries": 1, "supplied": {"oven": 1}, "reward": {"oven": 0.0}}


def test_the_statistics_survive_a_checkpoint_and_reach_the_prompts() -> None:
    from tensordict import NonTensorData, NonTensorStack, TensorDict

    part = SkillStatistics(settings())
    part.after_updates(step_rows({"a": [1.0]}, ("oven",)), {})
    resumed = SkillStatistics(settings())
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    tasks = [json.dumps({"task_type": name}) for name in ("bake", "wash", "bake")]
    columns = []
    for one in (part, resumed):
        prompts = TensorDict({"task": NonTensorStack.from_list([NonTensorData(text) for text in tasks])}, [3])
        one.before_rollout(prompts)
        columns.append(list(prompts[EVIDENCE_COLUMN]))
    assert columns[0] == columns[1]
    evidence = [Evidence.from_dict(json.loads(text)) for text in columns[0]]
    assert [item.ahead for item in evidence] == [0, 0, 1]
    assert [item.statistics.queries for item in evidence] == [1, 0, 1]
    assert all(item.explore for item in evidence)
    panel = SimpleNamespace(columns=[])
    resumed.before_validation(panel)
    shown = Evidence.from_dict(json.loads(panel.columns[0]({"task": tasks[0]})[EVIDENCE_COLUMN]))
    assert not shown.explore and shown.statistics.supplied == {"oven": 1}
