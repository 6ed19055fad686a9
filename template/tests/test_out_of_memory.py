"""A run without memory says what took it, and advises what can be set."""

import pytest
import torch

from conftest import SMOKE
from src.config import changed, flatten, load_config
from src.models import attention
from src.training import loss as loss_module
from src.training.out_of_memory import next_settings
from src.utils.errors import RunError, UserError


def test_out_of_memory_says_what_took_it_and_what_to_try(train, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loss_module, "summed_loss", fail)
    with pytest.raises(RunError, match=r"out of memory: weights .* GiB, gradients") as error:
        train()
    for change in (
        "(1) model.gradient_checkpointing=true (now auto",  # which recomputes nothing on a CPU
        "(2) training.optimizer=adamw8bit (now adamw)",
        "(3) training.batch_size=2 training.gradient_accumulation_steps=2 (now 4 and 1",
    ):
        assert change in str(error.value)


def test_every_setting_that_is_advised_is_accepted():
    for overrides in ([], ["model.init=pretrained", "training.batch_size=1"]):
        config, _ = load_config(SMOKE, overrides)
        for keys, _ in next_settings(config):
            key, _, value = keys.split(" ")[0].partition("=")
            then = load_config(SMOKE, [*overrides, *keys.split(" ")])[0]
            assert changed(config, keys) == then
            assert str(flatten(then.model_dump())[key]).lower() == value


@pytest.mark.parametrize("step", ["summed_loss", "backward"])
def test_a_cudnn_that_is_too_old_is_named_with_the_way_out(train, monkeypatch, step):
    def fail(*_, **__):
        raise RuntimeError("cuDNN Frontend error: Unified SDPA node doesn't yet support ragged\n…")

    if step == "summed_loss":
        monkeypatch.setattr(loss_module, "summed_loss", fail)
    else:
        monkeypatch.setattr(torch.Tensor, "backward", fail)
    with pytest.raises(RunError, match=r"^attention: cuDNN .*; torch|^attention: cuDNN") as error:
        train("data.eval=null")
    assert "remove yours from LD_LIBRARY_PATH" in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_named_too_where_the_attention_is_tried_first(make_model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("cuDNN Frontend error: no valid engine configs")

    monkeypatch.setattr(attention, "_try_varlen", fail)
    with pytest.raises(UserError, match="remove yours from LD_LIBRARY_PATH"):
        make_model()
    monkeypatch.setattr(attention, "_try_varlen", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_model()
