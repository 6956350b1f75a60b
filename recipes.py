"""Named settings: `python train.py --recipe NAME`; any flag given beside it wins."""

import os
from pathlib import Path

DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))  # "demo" where the checkout is the current folder

RECIPES = {
    # What `python train.py` runs when given nothing: a 3.4M-parameter Llama learns to answer, on a CPU, in about a minute.
    "demo": dict(
        model=str(DEMO / "base"),
        data=str(DEMO / "instructions.jsonl"),
        context=1024,
        batch_size=8,
        epochs=8,
        lr=1e-3,
        warmup_ratio=0.05,
    ),
}
