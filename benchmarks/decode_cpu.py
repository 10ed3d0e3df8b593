"""Decoding on this CPU: the block-FP8 model beside the bf16 model that it was made from.

    python benchmarks/decode_cpu.py SOURCE FP8 [--tokens 48] [--record]

Both models are loaded into one process and take turns token by token, each going first half of the
time, so that a noisy machine slows both. The result is checked first: both must answer the prompt
with the word that is expected. The ratio is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockscale.formats import DType
from blockscale.integrations.transformers import load_model
from record import append, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT, EXPECTED = "The capital of France is", "Paris"
WARM_UP_TOKENS = 4


@dataclass
class Decoder:
    """A model in the middle of a greedy continuation."""

    name: str
    model: PreTrainedModel
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cache: Any = None

    def prefill(self, prompt: torch.Tensor) -> None:
        """Read the prompt."""
        out = self.model(prompt, use_cache=True)
        self.cache = out.past_key_values
        self.tokens.append(int(out.logits[0, -1].argmax()))

    def step(self) -> None:
        """One more token, timed."""
        last = torch.tensor([self.tokens[-1:]])
        started = time.perf_counter()
        out = self.model(last, past_key_values=self.cache, use_cache=True)
        self.tokens.append(int(out.logits[0, -1].argmax()))
        self.seconds.append(time.perf_counter() - started)


def main() -> int:
    """Measure, print, and fail if a model does not know the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("fp8", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    options = parser.parse_args()
    for path in (options.source, options.fp8):
        if not path.is_dir():
            parser.error(f"{path}: no such directory; `make demo` makes both models")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # 5.24 calls the argument `cache` and warns; 5.0 knows only `past_key_values`.
    warnings.filterwarnings("ignore", "`past_key_values`", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    bf16 = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16).eval()
    fp8 = load_model(options.fp8, dtype=DType.BFLOAT16).model
    decoders = Decoder("bf16", bf16), Decoder("fp8", fp8)
    with torch.inference_mode():
        measure(decoders, tokenizer, options.tokens)
    for decoder in decoders:
        answer = tokenizer.decode(decoder.tokens)
        if EXPECTED not in answer:
            print(f"{decoder.name} answers {answer!r}, without {EXPECTED!r}", file=sys.stderr)
            return 1
    report(decoders, options)
    return 0


def measure(
    decoders: tuple[Decoder, Decoder], tokenizer: PreTrainedTokenizerBase, count: int
) -> None:
    """Let both continue the prompt, in turns."""
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for decoder in decoders:
        decoder.prefill(prompt)
    for index in range(WARM_UP_TOKENS + count):
        for decoder in decoders if index % 2 else reversed(decoders):
            decoder.step()


def report(decoders: tuple[Decoder, Decoder], options: argparse.Namespace) -> None:
    """Tokens per second of both, and the ratio with its spread."""
    bf16, fp8 = (decoder.seconds[WARM_UP_TOKENS:] for decoder in decoders)
    ratios = sorted(slow / fast for slow, fast in zip(bf16, fp8, strict=True))
    rates = {d.name: 1 / statistics.median(d.seconds[WARM_UP_TOKENS:]) for d in decoders}
    ratio = statistics.median(ratios)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"bf16 (transformers): {rates['bf16']:5.1f} tokens/s")
    print(f"fp8  (blockscale):   {rates['fp8']:5.1f} tokens/s")
    print(
        f"ratio fp8 / bf16:    {ratio:5.2f}  (p10 {low:.2f}, p90 {high:.2f}, {len(ratios)} pairs)"
    )
    if options.record:
        document = record(
            "decode_cpu",
            model=options.source.name,
            tokens=len(ratios),
            threads=torch.get_num_threads(),
            bf16_tokens_per_second=round(rates["bf16"], 2),
            fp8_tokens_per_second=round(rates["fp8"], 2),
            ratio=round(ratio, 3),
            ratio_p10=round(low, 3),
            ratio_p90=round(high, 3),
        )
        print(json.dumps(document))
        append(document)


if __name__ == "__main__":
    sys.exit(main())
