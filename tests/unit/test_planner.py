"""The planner's memory and time, and what it says of layouts that do and do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sdar_verl.cli import main
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.errors import ConfigError
from sdar_verl.planner.families import find_architecture
from sdar_verl.planner.hardware import GIB, Efficiency, find_gpu
from sdar_verl.planner.layout import Layout
from sdar_verl.planner.memory import activation_bytes, phases, resident, trainable
from sdar_verl.planner.plan import _gentler, changed, make_plan, recommend
from sdar_verl.planner.show import as_dict, as_text
from sdar_verl.planner.timing import phase_flops, step_seconds

H100 = find_gpu("h100-80gb")
RUN = Layout(architecture=find_architecture("qwen2.5-3b"), gpus=8, tensor_parallel=2)


def test_adam_keeps_eight_bytes_a_weight_and_gradients_four():
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    moments = sum(
        value.nbytes for state in optimizer.state.values() for key, value in state.items() if key.startswith("exp_avg")
    )
    weights = sum(p.numel() for p in model.parameters())
    assert moments == 8 * weights
    assert sum(p.grad.nbytes for p in model.parameters()) == 4 * weights


def test_what_is_sharded_halves_with_twice_the_cards_and_the_rest_stays():
    one, two = resident(RUN), resident(RUN.with_gpus(16))
    assert two["optimizer moments"] == one["optimizer moments"] / 2
    assert two["actor weights"] == one["actor weights"] / 2
    assert two["CUDA, NCCL, fragments"] == one["CUDA, NCCL, fragments"]


def test_what_is_sharded_over_fewer_cards_takes_more_room():
    """``fsdp_size`` of the actor and of the reference: 8 of 32 cards hold a copy."""
    node = "actor_rollout_ref.{}.fsdp_config.{}"
    names = [node.format(role, "fsdp_size=8") for role in ("actor", "ref")]
    kept = [node.format("ref", "param_offload=False"), "sdar.teacher.source=ema", "sdar.teacher.offload=False"]
    kept += ["actor_rollout_ref.actor.use_kl_loss=True", "trainer.nnodes=4"]
    over_all, both, own = (update_parts(*kept, *more) for more in ([], names, names[1:]))
    parts = ["actor weights", "optimizer moments", "gradients", "teacher weights"]
    for name in [*parts, "reference weights"]:
        assert both[name] == 4 * over_all[name]
        assert own[name] == (over_all if name in parts else both)[name]
    assert both["gathered weights"] == over_all["gathered weights"]
    assert update_parts(*kept, node.format("actor", "fsdp_size=64")) == over_all, "more than there are: all"


def update_parts(*overrides: str) -> dict[str, float]:
    return phases(planned(*overrides), H100.memory)[-1].parts


def test_checkpointing_keeps_one_layers_activations_and_every_layers_input():
    a = RUN.architecture
    full, light = (activation_bytes(replace(RUN, checkpointing=flag), 1000) for flag in (False, True))
    assert full == 1000 * a.layers * a.layer_activation_bytes()
    assert light == 1000 * (2 * a.hidden * a.layers + a.layer_activation_bytes())


@pytest.mark.parametrize(
    ("teacher", "extra"), [("none", None), ("actor", set()), ("ema", {"teacher weights"}), ("actor_fresh", set())]
)
def test_a_teachers_weights_take_room_where_they_are_a_copy(teacher, extra):
    found = {phase.name: phase for phase in phases(replace(RUN, teacher=teacher), H100.memory)}
    if extra is None:
        assert "teacher" not in found
    else:
        assert set(found["teacher"].parts) - set(found["old log-probs"].parts) == extra


def test_a_distribution_level_objective_costs_memory_and_more_over_the_full_vocabulary():
    sampled, top_k, full = (
        next(p for p in phases(replace(RUN, support=support), H100.memory) if p.name == "update").parts
        for support in (None, "top_k", "full")
    )
    assert "divergence" not in sampled
    a = RUN.architecture
    assert full["divergence"] - top_k["divergence"] == 2 * a.hidden * (a.vocabulary + RUN.micro_tokens)


def test_the_layout_reads_the_objectives_defaults():
    config = compose_config("sdar_alfworld", ["sdar.loss.objective=reverse_kl", "sdar.loss.gate=none"])
    layout = Layout.from_config(config, load_config(config.sdar))
    assert (layout.support, layout.chunk_tokens) == ("full", 128)
    config = compose_config("sdar_alfworld", ["sdar.loss.objective=jsd", "sdar.loss.support=top_k"])
    assert Layout.from_config(config, load_config(config.sdar)).support == "top_k"
    config = compose_config("sdar_alfworld", ["sdar.loss.gate=entropy"])
    layout = Layout.from_config(config, load_config(config.sdar))
    assert layout.support is None
    assert layout.entropy


def test_lora_trains_a_fraction_of_the_weights():
    lora = replace(RUN, lora_rank=16)
    assert trainable(lora) < 0.05 * trainable(RUN)
    assert resident(lora)["optimizer moments"] == 8 * trainable(lora) / 8


def test_loras_reference_is_the_base_in_the_actor():
    words = ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.ref.fsdp_config.param_offload=False"]
    words.append("actor_rollout_ref.actor.fsdp_config.param_offload=True")
    for lora in (0, 32):
        layout = planned(*words, f"actor_rollout_ref.model.lora_rank={lora}")
        for phase in phases(layout, H100.memory):
            assert ("reference weights" in phase.parts) is (lora == 0)
            assert ("actor weights" in phase.parts) is (
                phase.name not in ({"rollout"} if lora else {"rollout", "reference"})
            )


def test_phases_without_work_are_not_there():
    plain = replace(RUN, teacher="none", reference_pass=False)
    assert set(phase_flops(plain)) == {"old log-probs", "update"}
    assert set(phase_flops(RUN)) == {"old log-probs", "reference", "teacher", "update"}


def test_the_update_is_four_forward_passes_with_checkpointing_and_three_without():
    for flag, times in ((True, 4), (False, 3)):
        flops = phase_flops(replace(RUN, checkpointing=flag))
        assert flops["update"] == pytest.approx(times * flops["old log-probs"])


def test_twice_the_turns_take_twice_the_time():
    once, twice = (sum(step_seconds(replace(RUN, turns=turns), H100).values()) for turns in (10, 20))
    assert twice == pytest.approx(2 * once)


FEW_CARDS = ["model=qwen2.5-7b", "trainer.n_gpus_per_node=2"]
ACTOR = "actor_rollout_ref.actor.fsdp_config"


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "sdar.teacher.source=ema",
            "sdar.teacher.offload=False",
            "actor_rollout_ref.ref.fsdp_config.param_offload=False",
        ],
        [f"{ACTOR}.fsdp_size=1", "actor_rollout_ref.model.enable_gradient_checkpointing=False"],
    ],
)
def test_advice_to_a_layout_that_does_not_fit_saves_what_it_says(overrides):
    def total(phase: str, *words: str) -> float:
        return next(p.total for p in make_plan(planned(*FEW_CARDS, *overrides, *words), H100).phases if p.name == phase)

    faults = make_plan(planned(*FEW_CARDS, *overrides), H100).faults
    assert [fault.split(" needs ")[0] for fault in faults][-1] == "update"
    for fault in (faults[0], faults[-1]):
        phase, advice = fault.split(" needs ")[0], fault.split("): ")[1]
        for remedy in advice.split(", or "):
            words, saved = remedy.removesuffix(" GiB").split(" saves ")
            assert total(phase) - total(phase, *words.split()) == pytest.approx(int(saved) * GIB, abs=0.6 * GIB)


def test_no_offload_is_advised_that_cannot_help():
    """In the update weights and moments are at work; and what is set already is not said again."""
    offloads = [f"{ACTOR}.{name}_offload=True" for name in ("param", "optimizer")]
    for given in ([], offloads):
        faults = make_plan(planned(*FEW_CARDS, *given), find_gpu("a100-40gb")).faults
        advised = {name for name in offloads if any(name in fault for fault in faults)}
        assert advised == set(offloads) - set(given)
        (update,) = (fault for fault in faults if fault.startswith("update needs"))
        assert "_offload" not in update
        assert "trainer.n_gpus_per_node=4 saves" in update and "actor_rollout_ref.model.lora_rank=32 saves" in update


def test_a_card_is_too_small_where_nothing_helps():
    plan = make_plan(replace(RUN, longest=10**6, lora_rank=8), H100)
    assert [fault.split("): ")[1] for fault in plan.faults if "update" in fault] == ["use a card with more memory"]


def test_an_engine_deals_out_whole_heads(capsys):
    """Of 28 in Qwen2.5-7B: vLLM refuses 8 GPUs, whatever the memory."""
    size = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    assert main(["plan", "model=qwen2.5-7b", f"{size}=4"]) == 0
    assert main(["plan", "model=qwen2.5-7b", f"{size}=8"]) == 1
    assert f"  - {size}=8 does not divide the 28 attention heads of Qwen2.5-7B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "changes", "fault"),
    [
        (8, {"fsdp_size": 3}, "actor_rollout_ref.actor.fsdp_config.fsdp_size=3 does not divide the 8 training GPUs"),
        (8, {"reference_fsdp_size": 5}, "actor_rollout_ref.ref.fsdp_config.fsdp_size=5 does not divide the 8"),
        (6, {"mini_batch_rows": 256}, "sdar.update.mini_batch_rows=256 is no multiple of the 6 training GPUs"),
        (8, {"fsdp_size": 16, "mini_batch_rows": 256}, ""),
    ],
)
def test_what_cannot_be_dealt_out_evenly_is_a_fault(gpus, changes, fault):
    faults = make_plan(replace(RUN, gpus=gpus, **changes), H100).faults
    assert [line for line in faults if fault in line] if fault else not faults


@pytest.mark.parametrize(("gpus", "wished", "engine"), [(4, 3, 1), (5, 2, 1), (6, 4, 2), (2, 8, 2), (8, 4, 4)])
def test_engines_of_other_cards_can_be_dealt_out(gpus, wished, engine):
    assert replace(RUN, tensor_parallel=wished).with_gpus(gpus).tensor_parallel == engine
    apart = replace(RUN, tensor_parallel=wished, rollout_gpus=8, shares_rollout=False)
    assert apart.with_gpus(gpus).tensor_parallel == wished


def test_the_recommendation_fits_on_no_more_cards_than_needed():
    wished = replace(RUN, architecture=find_architecture("qwen2.5-7b"))
    found = recommend(wished, H100)
    assert found is not None and found.fits
    if found.layout.gpus > 1:
        half = found.layout.with_gpus(found.layout.gpus // 2)
        assert not make_plan(half, H100).fits
    assert changed(wished, found.layout)


def test_no_recommended_micro_batch_is_smaller_than_a_row():
    small = replace(RUN, longest=4608, micro_tokens=20000, forward_tokens=20000)
    sizes = {(one.micro_tokens, one.forward_tokens) for one in _gentler(small)}
    assert min(sizes) == (4608, 4608)


def test_nothing_is_recommended_where_nothing_fits():
    huge = replace(find_architecture("qwen2.5-7b"), hidden=65536, intermediate=262144, layers=200)
    assert recommend(replace(RUN, architecture=huge), H100) is None


def test_passes_of_several_teachers_and_bad_texts_are_counted():
    """Chosen teachers cost nothing more."""
    mixed = ["sdar.context.sources=[skills,sibling,answer]", "sdar.context.teachers.weights=[1,2,1]"]
    bad = ["sdar.context.contrast.sources=[feedback]", "sdar.context.contrast.texts=2"]
    chosen = [mixed[0], "sdar.context.teachers.by=task_type"]
    for overrides, passes in (([], 1), (mixed, 3), (bad, 3), ([*mixed, *bad], 5), (chosen, 1)):
        config = compose_config("sdar_alfworld", overrides)
        assert Layout.from_config(config, load_config(config.sdar)).teacher_passes == passes


def test_a_pool_of_its_own_is_counted_and_speeds_up_nothing_else():
    assert phase_flops(replace(RUN, anchor=True))["anchor"] == phase_flops(RUN)["old log-probs"]
    several = phase_flops(replace(RUN, teacher_passes=5))
    assert several["teacher"] == 5 * phase_flops(RUN)["teacher"] and several["update"] == phase_flops(RUN)["update"]
    assert ", 5 passes over each row" in as_text(make_plan(replace(RUN, teacher_passes=5), H100))
    pool = replace(RUN, teacher="snapshot", teacher_placement="pool", teacher_gpus=4)
    plan = make_plan(pool, H100)
    assert plan.cards == 12
    assert plan.seconds["teacher"] == pytest.approx(2 * make_plan(RUN, H100).seconds["teacher"])
    assert make_plan(replace(pool, teacher_gpus=0), H100).faults


def test_a_teacher_on_the_rollout_server_costs_its_memory_and_lengthens_the_rollout():
    """vLLM at 8192 tokens and Qwen's vocabulary: the 7 GiB that its users meet."""
    layout = replace(RUN, teacher_placement="rollout_server", longest=8192)
    server, trainer = make_plan(layout, H100), make_plan(RUN, H100)
    extra = server.phases[0].total - trainer.phases[0].total
    assert extra == pytest.approx(6 * 8192 * RUN.architecture.vocabulary)
    assert 6.5 < extra / GIB < 7.5
    smaller = make_plan(replace(layout, rollout_tokens=2048), H100)
    assert smaller.phases[0].total - trainer.phases[0].total == pytest.approx(extra / 4)
    assert "teacher" not in server.seconds and "teacher" not in {phase.name for phase in server.phases}
    longer = server.seconds["rollout"] - trainer.seconds["rollout"]
    shares = Efficiency()
    assert longer == pytest.approx(trainer.seconds["teacher"] * shares.forward / shares.prefill)


def test_a_rollout_of_its_own_runs_beside_the_training():
    separate = replace(RUN, rollout_gpus=4)
    together, apart = make_plan(RUN, H100), make_plan(separate, H100)
    training = together.step - together.seconds["rollout"]
    assert apart.cards == together.cards + 4
    assert apart.seconds["rollout"] > together.seconds["rollout"], "half as many engines"
    assert apart.step == pytest.approx(max(apart.seconds["rollout"], training))
    assert "beside the rest" in as_text(apart)
    assert "beside the rest" not in as_text(together)


def test_the_separate_modes_rollout_is_read_from_the_recipe():
    mode = ["model=qwen2.5-3b", "trainer.v1.trainer_mode=sdar_separate_async", "actor_rollout_ref.rollout.nnodes=2"]
    for overrides, gpus in ((mode, 16), (mode[:1] + mode[2:], 0)):
        config = compose_config("sdar_alfworld", overrides)
        assert Layout.from_config(config, load_config(config.sdar)).rollout_gpus == gpus


SEPARATE = ["trainer.v1.trainer_mode=sdar_separate_async", "actor_rollout_ref.rollout.nnodes=1"]


def test_training_cards_have_no_engine_where_the_rollout_has_all_of_them():
    """With verl's default they have one, which validations are played on: trainer_separate_async.py."""
    asleep, awake = "sleeping rollout engine", "rollout engine"
    for alone in (False, True):
        layout = planned(*SEPARATE, f"actor_rollout_ref.hybrid_engine={not alone}")
        found = {phase.name: phase.parts for phase in phases(layout, H100.memory)}
        assert {name for name, parts in found.items() if asleep in parts} == (
            set() if alone else {*found} - {"rollout"}
        )
        assert found["rollout"][awake] == layout.rollout_share * H100.memory
        assert (set(found["rollout"]) == {awake, "CUDA, NCCL, fragments"}) is alone


@pytest.mark.parametrize(
    ("training", "rollout", "hybrid", "named"),
    [(8, 6, True, "6 GPUs of the rollout"), (6, 8, True, "6 GPUs (trainer"), (6, 8, False, ""), (8, 4, True, "")],
)
def test_an_engine_has_its_cards_on_both_sides(training, rollout, hybrid, named):
    words = [*SEPARATE, f"trainer.n_gpus_per_node={training}", f"actor_rollout_ref.hybrid_engine={hybrid}"]
    words += [f"actor_rollout_ref.rollout.n_gpus_per_node={rollout}"]
    words += ["actor_rollout_ref.rollout.tensor_model_parallel_size=4"]
    if not named:
        assert planned(*words).rollout_gpus == rollout
        return
    with pytest.raises(ConfigError) as told:
        planned(*words)
    assert f"tensor_model_parallel_size=4 does not divide the {named}" in str(told.value)


def test_text_and_json_say_the_same():
    plan = make_plan(RUN, H100)
    data = json.loads(json.dumps(as_dict(plan, price=2.5)))
    assert data["cost"] == pytest.approx(2.5 * plan.gpu_hours)
    text = as_text(plan, price=2.5)
    for phase in plan.phases:
        assert f"{phase.name}" in text
        assert f"{phase.total / GIB:.1f}" in text


def test_an_unknown_model_or_card_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no-such-model"):
        find_architecture("no-such-model")
    with pytest.raises(ConfigError, match="h100-80gb"):
        find_gpu("abacus")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ConfigError, match="mixtral"):
        find_architecture(str(tmp_path))


def test_the_command_plans_a_recipe_with_overrides(capsys, tmp_path):
    chart = tmp_path / "memory.svg"
    arguments = ["plan", "--config-name", "sdar_alfworld", "model=qwen2.5-7b", "trainer.n_gpus_per_node=8"]
    status = main([*arguments, "--turns", "20", "--price", "2", "--json", "--plot", str(chart)])
    plan = json.loads(capsys.readouterr().out)
    assert status == (0 if plan["fits"] else 1)
    assert plan["gpus"] == 8
    assert plan["tokens_per_step"]["written by the policy"] == pytest.approx(128 * 20 * 512 / 3)
    assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert chart.read_text().count("<svg") == 1


def test_the_command_recommends_and_names_the_overrides(capsys):
    status = main(["plan", "model=qwen2.5-7b", "trainer.n_gpus_per_node=2", "--gpu", "a100-40gb", "--recommend"])
    text = capsys.readouterr().out
    assert status == 0
    assert "recommended:" in text
    assert "trainer.nnodes=1\n  trainer.n_gpus_per_node=" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--config-name", "sdar_nowhere"], "sdar_nowhere"),
        (["model=gpt-9"], "gpt-9"),
        (["--gpu", "abacus"], "abacus"),
        (["--training-efficiency", "1.5"], "--training-efficiency"),
        (["trainer.n_gpus_per_node=3"], "tensor_model_parallel_size"),
        (["trainer.n_gpus_per_node=0"], "trainer.n_gpus_per_node=0 must be a whole number at least 1"),
        (["actor_rollout_ref.rollout.n=0"], "actor_rollout_ref.rollout.n=0 must be"),
        (["data.train_batch_size=abc"], "data.train_batch_size=abc must be"),
    ],
)
def test_bad_arguments_of_the_command_are_named(capsys, arguments, word):
    assert main(["plan", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(capsys):
    main(["plan", "model=qwen2.5-7b", "--gpu", "a100-80gb", "trainer.n_gpus_per_node=4", "--json"])
    assert json.loads(capsys.readouterr().out)["gpus"] == 4
    with pytest.raises(SystemExit):
        main(["plan", "model=qwen2.5-7b", "--gpus=4"])
    assert "--gpus=4" in capsys.readouterr().err


def test_a_recipe_of_verls_has_a_row_per_conversation(capsys):
    arguments = ["plan", "--config-name", "sdar_ppo", "+model=qwen3-8b", "+hardware=8gpu", "data.train_batch_size=64"]
    arguments += ["actor_rollout_ref.rollout.n=8", "sdar.context.sources=[answer]", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens_per_step"]["read by the student"] == 64 * 8 * 512 / 2
    assert main([*arguments, "--turns", "3", "--prompt", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_step"]["read by the student"] == 64 * 8 * 3 * 100


def test_a_fixed_micro_batch_is_planned_for_the_longest_rows():
    fixed = ["actor_rollout_ref.actor.use_dynamic_bsz=False", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
    fixed += ["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False"]
    fixed += ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16"]
    layout, filled = planned(*fixed), planned()
    assert (layout.micro_tokens, layout.forward_tokens) == (4 * layout.longest, 16 * layout.longest)
    assert (filled.micro_tokens, filled.dynamic, filled.forward_dynamic) == (16384, True, True)
    many = make_plan(replace(layout, micro_tokens=10**6), H100)
    assert any(
        fault.startswith("update") and "actor_rollout_ref.actor.use_dynamic_bsz=True" in fault for fault in many.faults
    )
    found = recommend(replace(layout, micro_tokens=10**6), H100)
    assert found.fits
    assert "actor_rollout_ref.actor.use_dynamic_bsz=True" in changed(layout, found.layout)
    # What is printed leads to what was planned, also where the fixed rows came to the same number of tokens.
    fixed = {"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1", *fixed[:1], fixed[1][:-1] + "1", fixed[2]}
    one = planned(*sorted(fixed))
    switched = replace(one, dynamic=True, forward_dynamic=True)
    again = planned(*sorted(fixed), *changed(one, switched))
    assert (again.micro_tokens, again.forward_tokens) == (switched.micro_tokens, switched.forward_tokens)


def test_guesses_are_named_until_they_are_given(capsys):
    assert main(["plan", "--turns", "20", "--response", "150"]) in (0, 1)
    assert "until you give them: --prompt 1024 --context 1024;" in capsys.readouterr().out
    recipe = ["plan", "--config-name", "sdar_ppo", "+model=qwen3-8b", "method=grpo", "--json"]
    assert main([*recipe, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["guessed"] == ["prompt", "response"]
    assert main([*recipe, "--prompt", "9", "--response", "9"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["guessed"] == []


def planned(*overrides: str) -> Layout:
    config = compose_config("sdar_alfworld", ["model=qwen2.5-3b", *overrides])
    return Layout.from_config(config, load_config(config.sdar))


def test_what_the_policy_writes_is_counted_in_generations_and_seconds():
    lesson, guide, plain = planned("method=seed"), planned("method=grsd"), planned("method=sdar")
    assert (lesson.writings, guide.writings, plain.writings) == (128, 128 + 16, 0), "16 groups of 8: G + 1 each"
    assert (lesson.writer_prompt, lesson.writer_answer) == (1024, 256)
    plan, without = make_plan(lesson, H100), make_plan(plain, H100)
    assert "writing" not in without.seconds
    # As many as episodes, and as long as a turn: the time of a turn without its environment.
    alike = replace(RUN, writer="policy", writings=RUN.episodes, writer_prompt=RUN.prompt, writer_answer=RUN.response)
    seconds = make_plan(alike, H100).seconds
    assert seconds["writing"] == pytest.approx(seconds["rollout"] / RUN.turns - Efficiency().env_latency)
    assert "up to 128 contexts a step, 19,200 in all, written by the policy" in as_text(plan)


def test_calls_of_an_endpoint_are_counted_and_take_none_of_our_time():
    layout = planned("method=opid")
    assert (layout.writer, layout.writings, layout.writer_prompt) == ("endpoint", 128, 4096)
    plan = make_plan(layout, H100)
    assert "writing" not in plan.seconds and "written by the endpoint" in as_text(plan)
    assert as_dict(plan, None)["tokens_per_step"]["written by it"] == 128 * 512


def test_a_teacher_that_ends_costs_nothing_any_more():
    layout = planned("method=ahead", "trainer.total_training_steps=150")
    assert (layout.untaught_steps, layout.writings) == (101, 128)
    plan = make_plan(layout, H100)
    assert "up to 128 contexts a step, 6,272 in all" in as_text(plan)
    assert "150 steps, the last 101 without a teacher: " in as_text(plan)
    assert plan.untaught == {name: value for name, value in plan.seconds.items() if name != "teacher"}
    saved = 101 * plan.seconds["teacher"] / 3600
    assert plan.hours == pytest.approx(150 * plan.step / 3600 - saved) and plan.gpu_hours == plan.hours * plan.cards
    assert planned("method=seed").untaught_steps == 0
    assert planned("method=ahead", "trainer.total_training_steps=20").untaught_steps == 0


@pytest.mark.parametrize(("turns", "share"), [(1, 1.0), (2, 0.5), (3, 1 / 3), (25, 0.2)])
def test_the_turns_that_a_teacher_looks_at_are_rounded_up(turns, share):
    config = compose_config("sdar_alfworld", ["method=ocsd"])
    layout = Layout.from_config(config, load_config(config.sdar), turns=turns)
    assert layout.teacher_share == pytest.approx(share)
    flops = [phase_flops(replace(layout, teacher_share=s))["teacher"] for s in (share, 1.0)]
    assert flops[0] == pytest.approx(share * flops[1])
