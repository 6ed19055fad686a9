"""A run that does not fit its device is refused, shared or advised."""

import json
from types import SimpleNamespace

import pytest
import torch

from conftest import SMOKE
from src.config import changed, load_config
from src.models import attention
from src.training import fit, loss, strategy
from src.training.fit import check_feasible, choose_shards, next_settings
from src.utils import device
from src.utils.errors import RunError, UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
FULL = "training.optimizer=adamw"
OLD_CUDNN = "cuDNN Frontend error: Unified SDPA node doesn't yet support ragged\n…"


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """A config of an 8B model, and GPUs of so many GiB."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(*overrides: str, gib: float = 80):
        gpu = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        model = [f"model.name={tmp_path}", "model.init=pretrained", "data.max_length=2048"]
        return load_config(SMOKE, [*model, *overrides])

    return make


def test_eight_billion_parameters_are_refused_on_a_cpu_that_nobody_asked_for(configure) -> None:
    with pytest.raises(UserError, match=r"no GPU here, and .* 8.0 billion parameters: each step "):
        check_feasible(configure("lora.r=16"), CPU, torch.float32, shards=1)
    check_feasible(configure("lora.r=16", "device=cpu"), CPU, torch.float32, shards=1)
    check_feasible(load_config(SMOKE), CPU, torch.float32, shards=1)


def test_full_fine_tuning_without_the_memory_is_refused(configure) -> None:
    # 18 bytes a weight, or 6, as src/config.py says.
    eight, full = configure("training.optimizer=adamw8bit"), configure(FULL)
    with pytest.raises(UserError, match="135 GiB a GPU, and this one has 80: try training"):
        check_feasible(full, GPU, torch.bfloat16, shards=1)
    check_feasible(full, GPU, torch.bfloat16, shards=2)
    check_feasible(eight, GPU, torch.bfloat16, shards=1)
    configure(gib=40)
    with pytest.raises(UserError, match="45 GiB a GPU, and this one has 40: try "):
        check_feasible(eight, GPU, torch.bfloat16, shards=1)


@pytest.mark.parametrize(
    ("gib", "overrides", "dtype", "strategy", "shards"),
    [
        (80, [FULL], torch.bfloat16, "fsdp", 8),
        (300, [FULL], torch.bfloat16, "ddp", 1),
        (80, [FULL], torch.float16, "ddp", 1),
        (80, ["training.optimizer=adamw8bit"], torch.bfloat16, "ddp", 1),
        (80, ["lora.r=16"], torch.bfloat16, "ddp", 1),
        (16, ["lora.r=16"], torch.bfloat16, "fsdp", 8),
        (16, ["lora.r=16", "model.quantization=4bit"], torch.bfloat16, "ddp", 1),
        (300, [FULL, "training.strategy=hsdp"], torch.bfloat16, "hsdp", 4),
    ],
)
def test_many_processes_share_what_a_gpu_cannot_hold(
    configure, monkeypatch, capsys, gib, overrides: list[str], dtype, strategy: str, shards: int
) -> None:
    config = configure(*overrides, gib=gib)
    assert choose_shards(config, GPU, dtype) == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(fit, "WORLD_SIZE", 8)
    monkeypatch.setattr(fit, "LOCAL_WORLD_SIZE", 4)
    assert choose_shards(config, GPU, dtype) == shards
    assert f"strategy   {strategy}: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"training\.strategy: fsdp trains in bf16"):
        choose_shards(configure("training.strategy=fsdp"), GPU, torch.float16)


def test_the_size_is_known_before_anything_is_loaded(train, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "unusable_gpu", lambda: None)
    monkeypatch.setattr(fit, "count_before_loading", lambda _: 10**10)
    with pytest.raises(UserError, match=r"10\.0 billion"):
        train("device=auto", "model.init=random")


def raises(error: Exception):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(("owner", "name"), [(loss, "summed_loss"), (strategy, "build_objective")])
def test_out_of_memory_says_what_took_it_and_what_to_try(train, monkeypatch, owner, name) -> None:
    monkeypatch.setattr(owner, name, raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RunError, match=r"out of memory: a microbatch of 4 x 128 tokens") as error:
        train()
    for change in (
        "(1) training.optimizer=adamw8bit; ",
        "(2) training.batch_size=2 training.gradient_accumulation_steps=2; ",
        "(3) data.max_length=64",
    ):
        assert change in str(error.value)


def test_every_setting_that_is_advised_is_accepted_and_no_longer_advised(configure) -> None:
    for overrides in (["model.init=random"], [], ["training.batch_size=1", "lora.r=4"]):
        config, done = configure("data.max_length=32", *overrides), []
        while advised := next_settings(config):
            config = changed(config, advised[0].split())
            assert not [*config.contradictions()]
            done.append(advised[0].partition("=")[0])
        assert "data.max_length" in done
        assert len(done) < 12


@pytest.mark.parametrize(
    ("owner", "name"),
    [(attention, "probe"), (loss, "summed_loss"), (torch.Tensor, "backward")],
)
def test_a_cudnn_that_is_too_old_is_named_with_the_way_out(train, monkeypatch, owner, name) -> None:
    monkeypatch.setattr(owner, name, raises(RuntimeError(OLD_CUDNN)))
    with pytest.raises(RunError, match=r"^attention: .*cuDNN .* remove yours from LD_LIBRARY_PATH"):
        train("data.eval=null")
    monkeypatch.setattr(owner, name, raises(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        train("data.eval=null")
