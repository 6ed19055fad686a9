"""A run that cannot work on its device is refused before its weights are fetched."""

import json
from types import SimpleNamespace

import pytest
import torch

from conftest import SMOKE
from src.config import load_config
from src.training import feasibility
from src.training import strategy as training_strategy
from src.training.feasibility import check_feasible
from src.training.strategy import choose_strategy
from src.utils import device
from src.utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def configure(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(*overrides: str):
        model = [f"model.name={tmp_path}", "model.init=pretrained", "data.max_length=2048"]
        return load_config(SMOKE, [*model, *overrides])[0]

    return make


def test_eight_billion_parameters_are_refused_on_a_cpu_that_nobody_asked_for(configure) -> None:
    with pytest.raises(UserError, match=r"no GPU here, and .* 8.0 billion parameters: a step "):
        check_feasible(configure("lora.r=16"), CPU, torch.float32, shards=1)
    check_feasible(configure("lora.r=16", "device=cpu"), CPU, torch.float32, shards=1)
    small, _ = load_config(SMOKE)
    check_feasible(small, CPU, torch.float32, shards=1)


@pytest.mark.parametrize(
    ("gib", "optimizer", "shards", "advice"),
    [
        (80, "adamw", 1, "take 135 GiB a GPU, and this one has 80: try training.optimizer=adamw8"),
        (40, "adamw8bit", 1, "take 45 GiB a GPU, and this one has 40: try more GPUs"),
        (80, "adamw8bit", 1, None),
        (80, "adamw", 2, None),
    ],
)
def test_full_fine_tuning_without_the_memory_is_refused(
    configure, monkeypatch, gib: int, optimizer: str, shards: int, advice: str | None
) -> None:
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config = configure(f"training.optimizer={optimizer}")
    if advice is None:
        check_feasible(config, GPU, torch.bfloat16, shards)
        return
    with pytest.raises(UserError, match=advice):
        check_feasible(config, GPU, torch.bfloat16, shards)


@pytest.mark.parametrize(
    ("gib", "overrides", "dtype", "strategy"),
    [
        (80, ["training.optimizer=adamw"], torch.bfloat16, "fsdp"),
        (300, ["training.optimizer=adamw"], torch.bfloat16, "ddp"),
        (80, ["training.optimizer=adamw"], torch.float16, "ddp"),
        (80, ["training.optimizer=adamw8bit"], torch.bfloat16, "ddp"),
        (80, ["lora.r=16"], torch.bfloat16, "ddp"),
        (16, ["lora.r=16"], torch.bfloat16, "fsdp"),
        (16, ["lora.r=16", "model.quantization=4bit"], torch.bfloat16, "ddp"),
        (300, ["training.optimizer=adamw", "training.strategy=hsdp"], torch.bfloat16, "hsdp"),
    ],
)
def test_many_processes_share_what_a_gpu_cannot_hold(
    configure, monkeypatch, gib: int, overrides: list[str], dtype: torch.dtype, strategy: str
) -> None:
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config = configure(*overrides)
    assert choose_strategy(config, GPU, dtype) == ("", "")
    monkeypatch.setattr(training_strategy, "WORLD_SIZE", 8)
    chosen, why = choose_strategy(config, GPU, dtype)
    assert chosen == strategy
    assert why
    with pytest.raises(UserError, match=r"training\.strategy: fsdp trains in bf16"):
        choose_strategy(configure("training.strategy=fsdp"), GPU, torch.float16)


def test_the_size_is_known_before_anything_is_loaded(train, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "nvidia_driver", lambda: None)
    monkeypatch.setattr(feasibility, "count_before_loading", lambda _: 10**10)
    with pytest.raises(UserError, match=r"10\.0 billion"):
        train("device=auto", "model.init=random")
