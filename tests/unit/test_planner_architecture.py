"""The planner's architectures against the modules that transformers builds: weights, FLOPs, activations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sdar_verl.errors import ConfigError
from sdar_verl.planner.families import CONFIGS as MODELS
from sdar_verl.planner.families import FAMILIES, find_architecture, read_config

SMALL = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
FEW = {**SMALL, "num_key_value_heads": 2, "head_dim": 48}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
DELTA |= {"linear_conv_kernel_dim": 3}


def config_of(kind: str, **settings):
    return CONFIG_MAPPING[kind](**settings)


CONFIGS = {
    "qwen2, tied": config_of("qwen2", **SMALL, num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2, own head": config_of("qwen2", **SMALL, num_hidden_layers=2, num_key_value_heads=4),
    "qwen3, wide heads": config_of("qwen3", **FEW, num_hidden_layers=3, tie_word_embeddings=True),
    "qwen3, biases": config_of("qwen3", **FEW, num_hidden_layers=3, attention_bias=True),
    "llama": config_of("llama", **FEW, num_hidden_layers=3),
    "llama, biases": config_of("llama", **FEW, num_hidden_layers=3, attention_bias=True, mlp_bias=True),
    "qwen3_moe": config_of("qwen3_moe", **FEW, **MOE, num_hidden_layers=3),
    "qwen3_moe, two dense": config_of(
        "qwen3_moe", **FEW, **MOE, num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=2
    ),
    "qwen3_5": config_of("qwen3_5_text", **FEW, **DELTA, num_hidden_layers=5, tie_word_embeddings=True),
    "qwen3_5_moe": config_of(
        "qwen3_5_moe_text", **FEW, **DELTA, **MOE, num_hidden_layers=4, shared_expert_intermediate_size=56
    ),
    "gemma3": config_of("gemma3_text", **FEW, num_hidden_layers=3),
    "glm4": config_of("glm4", **FEW, num_hidden_layers=3),
    "glm4, biases": config_of("glm4", **FEW, num_hidden_layers=3, attention_bias=True),
    "gpt_oss": config_of("gpt_oss", **FEW, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2),
}


def weights_of(config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_module(name):
    assert read_config(CONFIGS[name].to_dict()).parameters == weights_of(CONFIGS[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_recipes_models_have_as_many_weights_as_transformers_builds(name):
    settings = {key: value for key, value in MODELS[name].items() if key != "model_type"}
    config = config_of(MODELS[name]["model_type"], **settings)
    assert find_architecture(name).parameters == weights_of(config)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", 3.09),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen3-1.7B", 1.72),
        ("Qwen/Qwen3-4B-Instruct-2507", 4.02),
        ("Qwen/Qwen3-8B-Base", 8.19),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", 30.53),
        ("Qwen/Qwen3.5-4B", 4.21),
    ],
)
def test_they_have_their_published_sizes(name, billions):
    assert find_architecture(name).parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_text_model_of_one_with_a_vision_tower_is_read():
    text = CONFIGS["qwen3_5"].to_dict()
    whole = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True, "vision_config": {"depth": 2}}
    assert read_config(whole).parameters == weights_of(CONFIGS["qwen3_5"])


@pytest.mark.parametrize("more", [{}, {"vocab_size": 200_000, "intermediate_size": 320}], ids=["sizes", "all sizes"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_leaves_out_is_transformers_default(tmp_path, kind, more):
    """Of tied heads, head size, key-value heads, kinds of layers and experts; Qwen3.5-MoE has no intermediate size."""
    sparse = {"num_hidden_layers": 8, "hidden_size": 1024, "num_attention_heads": 16, **more}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sparse}))
    assert find_architecture(str(tmp_path)).parameters == weights_of(config_of(kind, **sparse))


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"model_type": "qwen2", "hidden_size": "abc"}', '{"model_type": "qwen2", "text_config": 1}']
)
def test_a_config_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"model.path={tmp_path}: its config.json is none"):
        find_architecture(str(tmp_path))


def test_a_token_meets_its_own_experts_alone():
    a = read_config(MODELS["qwen3-30b-a3b"])
    met = a.matrix_parameters + 2 * a.vocabulary * a.hidden
    assert met / 1e9 == pytest.approx(3.35, abs=0.005), "published: 3.3 B"
    assert a.read_parameters(1) == pytest.approx(a.parameters - 48 * 120 * 3 * 2048 * 768)
    assert a.read_parameters(4096) == pytest.approx(a.parameters)


def test_linear_attention_has_no_cache():
    a = read_config(MODELS["qwen3.5-4b"])
    assert a.kv_bytes_per_token() == 2 * 2 * 8 * 4 * 256
    of_8, of_32 = (a.forward_flops([2048]) - 2 * a.forward_flops([1024]) for a in (a, replace(a, linear=None)))
    assert of_32 == pytest.approx(4 * of_8), "a quarter of the layers grows with the square of the length"


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_are_within_five_per_cent_of_torchs_counter(name):
    config, tokens = CONFIGS[name], 64
    # The counter does not see what a grouped product of experts does.
    experts = {"experts_implementation": "eager"} if read_config(config.to_dict()).experts else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **experts).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
    expected = read_config(config.to_dict()).forward_flops([tokens], causal=False)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def saved_bytes(config, tokens: int) -> int:
    """Distinct storages that a bf16 forward pass keeps for its backward pass, weights apart."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_a_layers_activations_are_what_autograd_keeps(kind):
    tokens = 32
    shapes = [kind(**SMALL, num_hidden_layers=layers, num_key_value_heads=2, head_dim=32) for layers in (2, 4)]
    two, four = (saved_bytes(shape, tokens) for shape in shapes)
    per_layer = (four - two) / 2 / tokens
    assert read_config(shapes[0].to_dict()).layer_activation_bytes() == pytest.approx(per_layer, rel=0.01)


def test_a_local_folder_is_read(tmp_path):
    config = CONFIGS["qwen3, wide heads"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert find_architecture(str(tmp_path)) == read_config(config.to_dict(), name=tmp_path.name)
