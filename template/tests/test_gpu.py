"""What only a CUDA device can show: `uv run pytest -m gpu`."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from conftest import ROOT, SMOKE, chat, load_model, tokens
from src.config import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig
from src.data.batching import collate_packed, full_batch, to_device
from src.models.attention import varlen_attention
from src.training.auto import prepare_layers, try_microbatches
from src.training.checkpoint import TrainState
from src.training.optimizer import make_optimizer
from src.training.trainer import StepResult, as_objective, evaluate, training_steps
from src.utils.memory import GIB, gpu_memory, print_gpu_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these tests need a CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def batches(tokenizer, write_rows) -> list[dict]:
    rows = [chat("why? " * (n % 7), "because " * (1 + n % 9)) for n in range(32)]
    data = tokens(write_rows(*rows), tokenizer, max_length=64)
    return [
        collate_packed(data[list(range(n, n + 8))], budget=512, max_length=64, pad_id=2)
        for n in range(0, 32, 8)
    ]


def load(
    saved_model, tokenizer, lora: bool = True, dtype=torch.bfloat16, trained_in=torch.float32,
    device: torch.device = GPU, **model,
):  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(name=str(saved_model), **model)
    adapters = LoraConfig(r=4) if lora else None
    return load_model(config, adapters, tokenizer, device, dtype, trained_in=trained_in)


def take_steps(
    model, batches, optimizer, scaler=None, dtype=torch.bfloat16, epochs: int = 1
) -> list[float]:
    """The loss of each step, on the model's device."""
    steps: list[StepResult] = []
    for _ in range(epochs):
        steps += training_steps(model, batches, optimizer, scaler, model.device, dtype=dtype)
    assert all(bool(step.finite) for step in steps)
    return [step.loss.item() for step in steps]


def assert_learnt(losses: list[float], saved_model, tokenizer, batches, lora: bool, rate: float):
    """Most of what the CPU learns in fp32: it knows how much there is to learn in ten epochs."""
    model = load(saved_model, tokenizer, lora, torch.float32, device=CPU)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=rate))
    expected = take_steps(model, batches, optimizer, dtype=torch.float32, epochs=10)
    assert losses[0] == pytest.approx(expected[0], rel=0.03)
    # Not all of it: adapters begin with other random numbers, quantized weights are rounded.
    assert losses[0] - losses[-1] > 0.7 * (expected[0] - expected[-1]) > 0.5


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 16])
def test_varlen_on_the_gpu_equals_the_cpu(heads, window):
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 70, 128, 128], dtype=torch.int32)
    q = torch.randn(1, heads[0], 128, 64)
    k, v = torch.randn(2, 1, heads[1], 128, 64)
    grads, outputs = [], []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        # Copies: `to` returns the same tensor where nothing changes, and that would be no leaf.
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out, _ = varlen_attention(
            torch.nn.Identity(), *leaves, None, sliding_window=window,
            cu_seq_lens_q=bounds.to(device), max_length_q=65,
        )  # fmt: skip
        out.float().square().sum().backward()
        outputs.append(out.float().cpu())
        grads.append([x.grad.float().cpu() for x in leaves])
    assert torch.allclose(*outputs, atol=3e-2)
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() / a.norm() < 3e-2


@pytest.mark.parametrize("quantization", ["full", "none", "4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_training_learns_in_bf16(
    saved_model, tokenizer, batches, quantization, checkpointing
):
    # full: fp32 weights, whose q and k reach the kernel in bf16 by a cast of ours alone.
    bits = quantization.replace("full", "none")
    model = load(
        saved_model, tokenizer, lora=quantization != "full", quantization=bits,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert model.config._attn_implementation == "varlen"
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    losses = take_steps(model, batches, optimizer, epochs=10)
    assert_learnt(losses, saved_model, tokenizer, batches, quantization != "full", 1e-2)


def test_evaluation_on_the_gpu_equals_the_cpu(saved_model, tokenizer, batches):
    found = evaluate(load(saved_model, tokenizer), batches, GPU)
    cpu = ModelConfig(name=str(saved_model))
    model = load_model(cpu, None, tokenizer, torch.device("cpu"), torch.float32, packing=True)
    expected = evaluate(model, batches, torch.device("cpu"), torch.float32)
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_wait_for_the_gpu_at_log_lines_only(
    saved_model, tokenizer, batches, lora, checkpointing
):
    model = load(saved_model, tokenizer, lora, gradient_checkpointing=checkpointing)
    optimizer = make_optimizer(model, TrainingConfig())
    take_steps(model, batches, optimizer)  # warm up

    def watched():
        # From the first batch on: before it, train_epoch looks once at the model's head.
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert len(take_steps(model, watched(), optimizer)) == len(batches)


def test_full_logits_never_exist(saved_model, tokenizer, batches):
    model = load(saved_model, tokenizer, lora=False)
    vocabulary = model.config.vocab_size
    optimizer = make_optimizer(model, TrainingConfig())
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == vocabulary:
                seen.append(out.shape[:-1].numel())
            return out

    with Watch():
        take_steps(model, batches[:1], optimizer)
    tokens = batches[0]["input_ids"].numel()
    assert seen
    assert max(n for n in seen if n != model.config.hidden_size) < tokens


def test_fp16_trains_with_the_scaler(saved_model, tokenizer, batches):
    model = load(saved_model, tokenizer, dtype=torch.float16)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    scaler = torch.amp.GradScaler("cuda")
    losses = take_steps(model, batches, optimizer, scaler, torch.float16, epochs=10)
    assert_learnt(losses, saved_model, tokenizer, batches, True, 1e-2)


def test_8bit_adamw_trains_bf16_weights(saved_model, tokenizer, batches):
    model = load(saved_model, tokenizer, lora=False, trained_in=torch.bfloat16)
    settings = TrainingConfig(optimizer="adamw8bit", learning_rate=1e-3)
    optimizer = make_optimizer(model, settings)
    losses = take_steps(model, batches, optimizer, epochs=10)
    assert_learnt(losses, saved_model, tokenizer, batches, False, 1e-3)


def test_checkpoints_in_the_hosts_memory_change_no_loss(saved_model, tokenizer, batches):
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = load(
            saved_model, tokenizer, gradient_checkpointing=True,
            gradient_checkpointing_offload=offload,
        )  # fmt: skip
        results.append(take_steps(model, batches, make_optimizer(model, TrainingConfig())))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.fixture
def forgetful_of_determinism():
    """Put torch's switches back: the tests that follow are not deterministic."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_deterministic_run_that_was_stopped_ends_in_the_same_weights(
    train, optimizer, forgetful_of_determinism
):
    options = ["device=cuda", "deterministic=true", f"training.optimizer={optimizer}"]
    options += ["training.max_steps=10", "training.save_every=5"]
    straight, twice = train(*options, output="straight"), train(*options, output="twice")
    final = "final/model.safetensors"
    assert (straight / final).read_bytes() == (twice / final).read_bytes()
    shutil.rmtree(twice / "checkpoints/step-00000010")  # as if it had died after its first
    shutil.rmtree(twice / "final")
    train(*options, "training.resume=auto", output="twice")
    assert (straight / final).read_bytes() == (twice / final).read_bytes()


def test_the_script_is_deterministic_without_help_from_the_environment(tmp_path):
    # In a process of its own: this one has CUBLAS_WORKSPACE_CONFIG from conftest.py.
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    options = ["device=cuda", "deterministic=true", "tracking.enabled=false"]
    options += ["training.max_steps=4", f"output_dir={tmp_path / 'run'}"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", SMOKE, *options], cwd=ROOT,
        env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_compiled_layers_take_the_same_steps(saved_model, tokenizer, batches):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = load(saved_model, tokenizer, compile=compiled)
        optimizer = make_optimizer(model, TrainingConfig())
        results.append(take_steps(model, batches, optimizer))
    assert results[0] == pytest.approx(results[1], rel=1e-2)


def test_auto_recomputes_as_few_layers_as_a_small_card_needs(tokenizer, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    AutoConfig.from_pretrained(ROOT / "configs/tiny", **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    peaks, total = {}, torch.cuda.mem_get_info()[1] / GIB
    for checkpointing in (True, False, "auto"):
        model = load(tmp_path, tokenizer, init="random", gradient_checkpointing=checkpointing)
        config = Config(
            output_dir="-", model=ModelConfig(name="-", compile=False),
            data=DataConfig(train="-", max_length=2048), training=TrainingConfig(batch_size=4),
        )  # fmt: skip
        run: Any = SimpleNamespace(
            config=config, model=model, objective=as_objective(model, torch.bfloat16),
            optimizer=make_optimizer(model, config.training), state=TrainState(),
            train_loader=SimpleNamespace(packing=True), total_steps=10,
        )  # fmt: skip
        if checkpointing == "auto":
            room = (peaks[True] + peaks[False]) / 2
            torch.cuda.set_per_process_memory_fraction(room / 0.94 / total)
            prepare_layers(run)
        batch = to_device(full_batch(4, 2048, packing=True), GPU)
        try:
            trial = try_microbatches(run, [batch])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        peaks[checkpointing] = trial.peak
    assert peaks[True] < peaks["auto"] <= room < peaks[False]
    assert peaks["auto"] > 0.8 * room, "more layers than needed"


def test_memory_is_reported_per_device(capsys):
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    memory = gpu_memory()
    assert memory["allocated"] >= 0.25
    assert memory["peak"] >= memory["allocated"] > 0
    assert memory["reserved"] >= memory["allocated"]
    assert 0 < memory["free"] < memory["total"]
    print_gpu_memory()
    assert capsys.readouterr().out.startswith("GPU memory: cuda:0 allocated")
    del block
