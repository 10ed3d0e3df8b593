"""Writes a famous model's checkpoint without its weights: headers to plan, 230 GB of holes.

python tools/model_headers.py MiniMax-M2.5 /tmp/minimax
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blockscale.testing.model_shapes import (
    deepseek_v3,
    minimax_m25,
    qwen3_8b,
    qwen3_30b_a3b,
    qwen3_235b_a22b,
    qwen3_coder_480b,
    write_model_headers,
)

MODELS = {
    model.name: model
    for model in (
        minimax_m25(),
        deepseek_v3(),
        qwen3_8b(),
        qwen3_30b_a3b(),
        qwen3_235b_a22b(),
        qwen3_coder_480b(),
    )
}


def main() -> None:
    """Write one model's headers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    write_model_headers(options.directory, MODELS[options.model])
    print(f"{options.directory}: {len(MODELS[options.model].tensors)} tensors, headers only")


if __name__ == "__main__":
    main()
