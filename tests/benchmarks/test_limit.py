import pytest
import torch
from tiny_setting import tiny_setting
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.limit import arithmetic, pair_flops, utilisation
from benchmarks.shapes import configuration, head_flops, layer_flops


def test_the_arithmetic_of_gemma_2_2b_is_the_known_one():
    rows = arithmetic(configuration("google/gemma-2-2b"), 16_384)
    body, head, attention, sae = (row["GFLOP"] for row in rows)
    assert [row["parameters"] / 1e9 for row in rows[:2]] == pytest.approx([2.024, 0.590], abs=1e-3)
    assert (round(body, 2), round(head, 2), round(attention, 2)) == (4.05, 1.18, 0.11)
    assert sae / (body + head + attention) == pytest.approx(0.014, abs=5e-4)


def test_a_run_at_the_device_s_rate_has_a_utilisation_of_100(world):
    config = configuration("google/gemma-2-2b")
    pairs = {"packed": 845.0, "response": 330.0, "attended": 3e5}
    flops = pair_flops(config, pairs, tiny_setting(world, width=16_384))
    assert flops["model"] == pytest.approx(845 * 4.05e9 + 660 * 1.18e9 + 4 * 26 * 2048 * 3e5, rel=0.01)
    rate = 1e15
    training, stage_one = (3 * flops["model"] + flops["sae"]) / rate, (flops["model"] + flops["sae"]) / rate
    results = {
        "fpo": {"seconds_a_pair": training, "tensor_bytes": 1, "cores_busy": 2.0},
        "fpo-ckpt": {"seconds_a_pair": 2 * training, "tensor_bytes": 1, "cores_busy": 2.0},
        "stage one": {"seconds_a_pair": stage_one, "tensor_bytes": 1, "cores_busy": 2.0},
        "dpo": {"failed": "out of memory"},
    }
    rows = utilisation(results, flops, rate)
    assert [row.get("of the device's, %") for row in rows] == [
        pytest.approx(100),
        pytest.approx(50),
        pytest.approx(100),
        None,
    ]
    assert rows[0]["hours for 61,135 pairs"] == pytest.approx(61_135 * training / 3600)


def test_the_flops_are_those_that_torch_counts():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=16
    )
    config._attn_implementation = "eager"
    model, tokens = AutoModelForCausalLM.from_config(config), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    counted = layer_flops(config, tokens, tokens**2) + head_flops(config, tokens)  # eager computes every pair
    norms = 2 * (2 * 3 + 1) * 32 * tokens  # parameters of norms count as matrices in the formula
    assert counted - norms == pytest.approx(counter.get_total_flops(), rel=1e-3)
