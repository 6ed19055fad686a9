"""The accounting of speed counts what is computed, no more."""

import numpy as np
import pytest
import torch

from src.training.speed import Speed, count_flops, matmul_rate

# configs/tiny: 2 layers of width 128, 4 heads of 32 with 2 for keys and values, MLP 384.
LAYERS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
LORA = 2 * 4 * (2 * 256 + 2 * 192 + 3 * 512)  # r=4: r * (in + out) of each projection
HEAD = 128 * 512
ATTENTION = 2 * 4 * 32 * 4 * (100 / 2)  # layers x heads x head_dim x 4 x half of 100 tokens


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_lora_needs_4n_and_full_fine_tuning_6n(make_model, quantization):
    lengths = np.array([100, 100])
    per_token, per_label = count_flops(make_model(lora=True, quantization=quantization), lengths)
    assert per_token == pytest.approx(4 * LAYERS + 6 * LORA + 3 * ATTENTION)
    assert per_label == 4 * HEAD
    if quantization == "none":
        per_token, per_label = count_flops(make_model(), lengths)
        assert per_token == pytest.approx(6 * LAYERS + 3 * ATTENTION)
        assert per_label == 6 * HEAD


def test_utilisation_counts_real_tokens_and_labels_only():
    speed = Speed(per_token=10.0, per_label=2.0, matmul=1000.0)
    assert speed.utilisation(tokens=50, labelled=25, seconds=1.1, devices=1) == pytest.approx(0.5)


def test_the_rate_of_this_device_is_measured():
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e9
