"""Fine-tune a mixture-of-experts model of transformers with exact subset routing, beside two baselines.

    python examples/finetune_transformers.py                                         # a tiny random OLMoE, no network
    python examples/finetune_transformers.py --model allenai/OLMoE-1B-7B-0924 --text notes.txt --steps 200

Four runs from the same weights, with transformers' Trainer: the stock top-k router; the same with a frozen router;
exactly as many experts per token, sampled; and --kmin to --kmax of them. Samples are drawn at --temperature: 0.5 is for
many passes through little text, 0.25 for plenty (docs/which-router.md). Prints the loss on held-out text before and
after, and what was executed. Needs: pip install 'circuitroute[transformers]' accelerate
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import circuitroute as cr

RUNS = ("stock", "frozen router", "exact-k", "range-k")


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of a long text, as token ids."""

    def __init__(self, ids: torch.Tensor, length: int) -> None:
        self.rows = ids[: len(ids) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class Trainer(transformers.Trainer):
    """Adds the load-balance loss of the decisions that were taken, where a handle is given."""

    def __init__(self, *, handle: Any, coefficient: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.handle = handle
        self.coefficient = coefficient

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's loss, and the auxiliary one in training."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.handle is not None and model.training:
            loss = loss + self.coefficient * self.handle.load_balance_loss(inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss


def tiny_model(seed: int) -> Any:
    """A random OLMoE of bytes: 16 experts, 4 per token."""
    torch.manual_seed(seed)
    config = transformers.OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        vocab_size=256,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.OlmoeForCausalLM(config)


def read_ids(options: argparse.Namespace) -> torch.Tensor:
    """The text as token ids: bytes for the tiny model, else by the checkpoint's tokenizer."""
    text = Path(options.text).read_text(encoding="utf-8") if options.text else _sources()
    if options.model is None:
        return torch.tensor(list(text.encode("utf-8")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return tokenizer(text, return_tensors="pt")["input_ids"][0]


def _sources() -> str:
    """What there is to read everywhere: this library."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(Path(cr.__file__).parent.rglob("*.py")))


def prepare(run: str, model: Any, options: argparse.Namespace) -> Any:
    """Make the model what the run asks for; returns the handle of a patched one."""
    adapter = cr.integrations.transformers
    own = adapter.own_constraints(model)
    if run == "frozen router":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in (".gate.", ".router.")))
    if run == "exact-k":
        return adapter.patch(model, own, temperature=options.temperature, seed=options.seed)
    if run == "range-k":
        wanted = cr.Between(options.kmin, options.kmax)
        return adapter.patch(model, wanted, temperature=options.temperature, seed=options.seed)
    return None


def active_experts(model: Any, handle: Any, batch: dict[str, torch.Tensor]) -> float:
    """Executed experts per token and layer, in evaluation."""
    if handle is None:
        return float(getattr(model.config, "num_experts_per_tok", float("nan")))
    model.eval()
    with torch.no_grad():
        model(**{name: value[None].to(model.device) for name, value in batch.items()})
    return sum(cr.metrics.active_experts(routing) for routing in handle.routings) / len(handle.routings)


def fine_tune(run: str, model: Any, train: Lines, held_out: Lines, options: argparse.Namespace) -> dict[str, Any]:
    """One run: a row of the table."""
    handle = prepare(run, model, options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            seed=options.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        if options.checkpointing:  # not reentrant, so that the load-balance loss has a gradient
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[handle.trainer_callback()] if handle is not None else [],
            handle=handle,
            coefficient=options.balance,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = trainer.evaluate()["eval_loss"]
    return {
        "run": run,
        "before": before,
        "after": after,
        "experts": active_experts(model, handle, held_out[0]),
        "seconds": seconds,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a mixture-of-experts model, by four ways of routing.")
    parser.add_argument("--model", help="a checkpoint: repository or path (default: a tiny random OLMoE)")
    parser.add_argument("--text", help="a text file (default: the sources of circuitroute)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--held-out", type=int, default=16, help="sequences to evaluate on")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--kmin", type=int, default=2)
    parser.add_argument("--kmax", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=0.5, help="of the samples, in units of logits")
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balance loss")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print the table, return its rows."""
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    ids = read_ids(options)
    cut = len(ids) - options.held_out * options.length
    train, held_out = Lines(ids[:cut], options.length), Lines(ids[cut:], options.length)
    if options.model is None:
        start = tiny_model(options.seed)
    else:
        start = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    print(f"{'run':<14} {'loss before':>11} {'after':>8} {'experts/token':>14} {'seconds':>8}")
    rows = []
    for run in options.runs:
        row = fine_tune(run, copy.deepcopy(start), train, held_out, options)
        rows.append(row)
        print(
            f"{row['run']:<14} {row['before']:>11.4f} {row['after']:>8.4f} {row['experts']:>14.2f} "
            f"{row['seconds']:>8.1f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
