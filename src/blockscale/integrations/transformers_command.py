"""The ``transformers`` command, with block-FP8 checkpoints run by plan.

    python -m blockscale.integrations.transformers_command serve MODEL --device cpu

Everything after the module's name is transformers' own. What was planned and prepared is logged to
stderr, one line each (``blockscale.events``).
"""

from __future__ import annotations

import logging


def main() -> None:
    """Take over block-FP8 checkpoints, show our events, hand the arguments on."""
    from blockscale.integrations.transformers_quantizer import plan_by_default

    plan_by_default()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("blockscale")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    from transformers.cli.transformers import app

    app()


if __name__ == "__main__":
    main()
