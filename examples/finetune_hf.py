"""Fine-tune and prune a causal language model of Hugging Face, from a folder on this machine.

    pip install resu-compile[hf,train]
    python examples/finetune_hf.py MODEL_DIR text.txt --sparsity 0.5 --output sparse_model

The folder is one of ``save_pretrained``. Its embeddings and head stay dense. What is written loads
with ``from_pretrained`` like any other model; its pruned weights are zeros.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import resu_compile as resu
from resu_compile.training import Trainer, TrainingConfig


def token_ids(folder: str, text: str) -> Tensor:
    """The text in the model's own tokens, or in bytes if the folder has no tokenizer."""
    if not any(Path(folder).glob("tokenizer*")):
        return torch.tensor(list(text.encode()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(text)["input_ids"])


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Fine-tune, write the model and return it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder of save_pretrained")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--method", default="resu")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--output", type=Path, default=Path("sparse_model"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    tokens = token_ids(options.model, options.text.read_text(encoding="utf-8"))
    train, held_out = tokens.tensor_split([int(0.9 * len(tokens))])
    offsets = torch.arange(options.context)

    def batches(epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(options.steps):
            last = len(train) - options.context + 1
            starts = torch.randint(last, (options.batch,), generator=generator)
            yield train[starts[:, None] + offsets].to(options.device)  # (batch, context)

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def evaluate(model: nn.Module) -> dict[str, float]:
        windows = held_out.unfold(0, options.context, options.context)[:64]
        losses = [loss_fn(model, window[None].to(options.device)).item() for window in windows]
        return {"loss": sum(losses) / len(losses)}

    config = TrainingConfig(
        method=options.method,
        steps=options.steps,
        sparsity=options.sparsity,
        clip_norm=1.0,
        compile=not options.eager,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    model.eval()
    with torch.no_grad():
        before = evaluate(model)["loss"]
    result = Trainer(model, optimizer, loss_fn, config, evaluate=evaluate).fit(batches)
    after = [r for r in result.stats if r["event"] == "evaluation"][-1]["metrics"]["loss"]
    print(resu.report(model).table())
    print(f"held-out loss: {before:.4f} dense before, {after:.4f} at {options.sparsity:.0%}")
    model.save_pretrained(options.output)
    return model


if __name__ == "__main__":
    main()
