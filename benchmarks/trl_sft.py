"""The peer: the same training as a user of TRL writes it; `compare.py` runs and times it.

Nothing here slows TRL down: no tracker, no checkpoint, no gradient checkpointing, no progress bar.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Counter(TrainerCallback):
    """Counts real and labelled tokens per batch, and says when a step is done."""

    def __init__(self, output: Path, collator: Any) -> None:
        self.output, self.collator = output, collator
        self.batches: list[tuple[int, int]] = []

    def collate(self, rows: list[dict]) -> dict:
        """TRL's own batch, counted. The loader reads one batch ahead: a list keeps the order."""
        batch = self.collator(rows)
        real = batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] >= 0
        labelled = batch["labels"][:, 1:] != -100
        self.batches.append((int(real.sum()), int(labelled.sum())))
        return batch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say so once the device is done too."""
        metrics = {"step": state.global_step}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(f"step {state.global_step}", flush=True)
        done = self.batches[: state.global_step]
        metrics["tokens"] = sum(tokens for tokens, _ in done)
        metrics["labelled_tokens"] = sum(labelled for _, labelled in done)
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def main(settings: dict[str, Any]) -> None:
    """Train as `settings` of `compare.py` say."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    output, half = Path(settings["output"]), settings["dtype"] == "bf16"
    output.mkdir(parents=True)
    rows = load_dataset("json", data_files=settings["rows"], split="train")
    trainer = SFTTrainer(
        model=settings["model"],
        args=SFTConfig(
            str(output),
            # TRL's own default is fp32 weights: twice the memory. These are as ours.
            model_init_kwargs={"dtype": "bfloat16" if half else "float32"},
            packing=settings["packing"],
            max_length=settings["max_length"],
            per_device_train_batch_size=settings["batch_size"],
            assistant_only_loss="messages" in rows.column_names,
            max_steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            use_liger_kernel=settings["liger"],
            bf16=half,
            use_cpu=settings["device"] == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=settings["seed"],
        ),
        train_dataset=rows,
        quantization_config=quantization if settings["quantization"] == "4bit" else None,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
    )
    counter = Counter(output, trainer.data_collator)
    trainer.data_collator = counter.collate
    trainer.add_callback(counter)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
