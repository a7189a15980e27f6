"""Names of prompts: in order, without verl's separator, and what requests are seeded with."""

from __future__ import annotations

from transfer_queue import KVBatchMeta

from sdar_verl.rollout.uids import PromptUids, seed_part, seeded
from sdar_verl.verl.queue import in_order, row_id


def test_names_sort_as_they_were_submitted_and_start_anew_with_each_step():
    uids = PromptUids()
    names = [*uids.name(1, ["a", "b"]), *uids.name(1, ["c"]), *uids.name(2, ["a"]), *uids.name(11, ["b"])]
    assert names == sorted(names)
    assert len(set(names)) == 5
    assert not any("_" in name for name in names)
    assert uids.name(12, ["a"]) == PromptUids().name(12, ["a"]), "a resumed run names as the one that went on"
    assert row_id(f"{names[2]}_10_3") == (names[2], 10, 3)


def test_rows_come_in_one_order_whichever_ended_first():
    keys = ["s2p0_0_0", "s1p10_0_0", "s1p2_10_0", "s1p2_9_10", "s1p2_9_9"]
    batch = in_order(KVBatchMeta(partition_id="train", keys=list(keys), tags=[{"key": key} for key in keys]))
    assert [tag["key"] for tag in batch.tags] == batch.keys == sorted(keys, key=row_id)
    assert batch.keys.index("s1p2_9_9") < batch.keys.index("s1p2_9_10") < batch.keys.index("s1p2_10_0")
    assert row_id("a_b_1_0") == ("a_b", 1, 0), "a uid of somebody else's may hold the separator"
    assert row_id("s1p2_9_10").episode == "s1p2_9"


def test_a_task_that_a_step_draws_again_gets_other_seeds():
    uids = PromptUids()
    first = [seed_part(name, 7) for name in uids.name(7, ["a", "b", "a"])]
    later = [seed_part(name, 7) for name in uids.name(7, ["a"])]
    assert [*first, *later] == ["7", "7", "7r1", "7r2"]
    assert seed_part(uids.name(8, ["a"])[0], 8) == "8"


def test_a_prompt_that_a_resume_submits_again_keeps_its_seed():
    name = PromptUids().name(3, ["a"])[0]
    assert seed_part(name, 9) == "3"


def test_a_seed_has_the_name_that_the_server_reads():
    assert seeded({"top_p": 1.0}, 5, "vllm") == {"top_p": 1.0, "seed": 5}
    assert seeded({}, 5, "sglang") == {"sampling_seed": 5} and seeded({}, None, "sglang") == {}


def test_validation_prompts_are_seeded_with_the_step():
    assert seed_part("0b0c5f8e-8d0a-4c2f-9a6e-5f7f4b1c2d3e", 4) == "4"
    assert seed_part(None, None) == "None"
