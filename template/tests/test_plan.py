"""What follows from a plan of the memory, and what its script says."""

import re

import pytest

import scripts.plan
from conftest import SMOKE, tokens
from src.config import Config, load_config
from src.training import plan as plan_module
from src.training.plan import Plan, cheapest_that_fits, cost, largest_batch
from src.training.speed import count_flops

CHECKPOINTING = "model.gradient_checkpointing=true"
NO_CHECKPOINTING = "model.gradient_checkpointing=false"


@pytest.fixture
def formula(monkeypatch) -> None:
    """A step takes 2 GiB, and a row 1; 0.25 where layers are recomputed."""

    def planned(config: Config) -> Plan:
        row = 0.25 if config.model.gradient_checkpointing is True else 1.0
        rows = config.training.batch_size * config.data.max_length / 128
        return Plan(1.0, 0.0, 0.0, row * rows)

    monkeypatch.setattr(plan_module, "plan", planned)


def configured(*overrides: str) -> Config:
    return load_config(SMOKE, [*overrides])


@pytest.mark.usefixtures("formula")
def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    config = configured(NO_CHECKPOINTING)
    assert [largest_batch(config, gib) for gib in (2.9, 20.99, 21)] == [0, 18, 19]
    assert largest_batch(configured(), 3) == 4, "auto can recompute every layer"


@pytest.mark.usefixtures("formula")
def test_the_cheapest_change_that_fits_is_advised() -> None:
    config = configured("lora.r=16", "model.init=pretrained", NO_CHECKPOINTING)
    assert cheapest_that_fits(config, 3) == (CHECKPOINTING, 3.0)
    keys, peak = cheapest_that_fits(config, 2.3) or ("", 0)
    assert {CHECKPOINTING, "training.batch_size=1"} <= set(keys.split())
    assert peak == 2.25
    assert cheapest_that_fits(config, 1.0) is None


# --- the script


def printed(capsys, *arguments: str) -> str:
    scripts.plan.main([SMOKE, *arguments])
    return capsys.readouterr().out


@pytest.mark.usefixtures("formula")
def test_the_script_says_what_fits_what_would_fit_and_what_auto_will_do(capsys) -> None:
    page = printed(capsys, "--gpu", "7")
    gib = [float(size) for size in re.findall(r"^\w+ +([\d.]+) GiB$", page, re.MULTILINE)]
    assert gib == [1, 0, 0, 4, 1, 6]
    assert "planned with no layer recomputed" in page
    assert "compiled layers take less" in page
    assert "fits in 7 GiB; the largest training.batch_size that does: 20" in page
    assert "planned with every layer recomputed" in printed(capsys, "--gpu", "5")
    page = printed(capsys, "--gpu", "h100", NO_CHECKPOINTING, "model.compile=false")
    assert "fits in 79 GiB; the largest training.batch_size that does: 77" in page
    assert "recomputed" not in page
    assert "compiled" not in page
    page = printed(capsys, "--gpu", "2.2")
    assert "does not fit in 2.2 GiB; the largest training.batch_size that does: none" in page
    assert re.search(r"^try .* data.max_length=64: 2\.12 GiB, as planned with it", page, re.M)


@pytest.mark.usefixtures("formula")
def test_steps_tokens_and_hours_of_the_run_are_those_that_training_counts(
    make_model, tokenizer, capsys
) -> None:
    page = printed(capsys, "--gpu", "h100")
    # Forty epochs in steps of one batch; the FLOPs of a token are those that mfu is counted with.
    rows = tokens("data/sample.jsonl", tokenizer, max_length=128)
    token, label = count_flops(make_model(), rows.lengths)
    all_tokens = rows.lengths.sum()
    flops = 40 * (token * all_tokens + label * rows.facts.labelled_tokens)
    counted = re.search(r"^(\d+) steps, ([\d,]+) tokens\n([\d.e-]+) hours at", page, re.M)
    assert counted
    assert int(counted[2].replace(",", "")) == 40 * all_tokens
    assert float(counted[3]) == pytest.approx(flops / (0.4 * 989e12) / 3600, rel=0.01)
    steps, seen, _ = cost(configured("training.max_steps=8"), rows)
    assert (steps, seen) == (8, 40 * all_tokens * 8 // int(counted[1]))
