"""Perplexity of a block-FP8 checkpoint beside the bf16 one it was made from.

    python benchmarks/perplexity.py SOURCE FP8... [--tokens 20480] [--record]

Text: the help topics that ship with Python (pydoc_data/topics.py). Windows of 512 tokens; every
token but the first of a window is predicted. ``--backend reference`` quantizes activations too, as
GPU backends do; ``cpu`` quantizes weights only. Exits with 1 if a checkpoint is over 3 % worse.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING

import torch

from blockscale.formats import DType
from blockscale.integrations.transformers import load_model
from blockscale.planning.policy import PlanPolicy
from record import append, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 512
LIMIT = 1.03


def main() -> int:
    """Measure all checkpoints on the same tokens and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("fp8", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--backend", default="cpu", choices=("cpu", "reference"))
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    windows = token_windows(options.source, options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16).eval()
    found = {options.source.name: perplexity(model, windows)}
    del model
    for path in options.fp8:
        policy = PlanPolicy(backends=(options.backend,))
        loaded = load_model(path, dtype=DType.BFLOAT16, policy=policy)
        found[path.name] = perplexity(loaded.model, windows)
    return report(found, options, windows.numel())


def token_windows(source: Path, count: int) -> torch.Tensor:
    """(windows, ``WINDOW``) token ids; raises if the text is too short."""
    from transformers import AutoTokenizer

    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=10**9)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    windows = count // WINDOW
    if len(ids) < windows * WINDOW:
        msg = f"the text has {len(ids)} tokens, fewer than {windows * WINDOW}"
        raise ValueError(msg)
    return ids[: windows * WINDOW].reshape(windows, WINDOW)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Exponential of the mean negative log-likelihood, in float64 sums."""
    total, predicted = 0.0, 0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        total += float(loss.double().sum())
        predicted += len(loss)
    return math.exp(total / predicted)


def report(found: dict[str, float], options: argparse.Namespace, tokens: int) -> int:
    """Print the table; 1 if a limit is passed."""
    base = found[options.source.name]
    for name, value in found.items():
        print(f"{name:24} perplexity {value:8.4f}   {value / base - 1:+.2%} of bf16")
    if options.record:
        document = record(
            "perplexity",
            tokens=tokens,
            window=WINDOW,
            backend=options.backend,
            text="pydoc_data/topics.py",
            perplexity={name: round(value, 4) for name, value in found.items()},
            relative={name: round(value / base - 1, 5) for name, value in found.items()},
        )
        print(json.dumps(document))
        append(document)
    return int(any(value > LIMIT * base for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
