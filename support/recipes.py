"""Named settings: `python train.py --recipe NAME`; any flag given beside it wins. `--recipe list` prints them.

The paper's Appendix F: two models, two data sets, four methods. What it does not say is `Config`'s default, or is a
row of the table "Where the paper is silent" in docs/paper.md.
"""

import os
from pathlib import Path

DEMO = Path(os.path.relpath(Path(__file__).parents[1] / "demo"))  # "demo" where the checkout is the current folder

LLAMA_3B = dict(model="meta-llama/Llama-3.2-3B")
LLAMA_8B = dict(model="meta-llama/Llama-3.1-8B")
LIMA = dict(
    data="hf://datasets/GAIR/lima/train.jsonl",
    epochs=15,
    batch_size=64,
    context=4096,
    lr=1e-5,
    warmup_ratio=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),  # LIMA's own paper; this one names none
    eps=1e-8,
    schedule="cosine",
)
ALPACA = dict(
    data="hf://datasets/yahma/alpaca-cleaned/alpaca_data_cleaned.json",  # the paper's 51,760 rows
    batch_size=32,
    context=4096,
    warmup_ratio=0.07,
    weight_decay=0.05,
    betas=(0.9, 0.999),
    eps=1e-8,
    schedule="cosine",
)
SFT = dict(grouper="none", objective="cross_entropy", lam_max=0.0)


def go(grouper: str, eta: float, lam_min: float | None = None) -> dict:
    """SFT-GO with λ = 0.9, or decaying from there to lam_min."""
    return dict(grouper=grouper, eta=(eta,), lam_max=0.9, lam_min=lam_min)


def rho1(eta: float) -> dict:
    """Cross-entropy over the selected tokens alone; λ is not used."""
    return dict(grouper="rho1", eta=(eta,), objective="important_only", lam_max=1.0)


RECIPES = {
    # What `python train.py` runs when given nothing: a 3.4M-parameter Llama learns to answer, in about a minute.
    "demo": dict(
        model=str(DEMO / "base"),
        data=str(DEMO / "instructions.jsonl"),
        context=1024,
        batch_size=8,
        epochs=8,
        lr=1e-3,
        warmup_ratio=0.05,
    )
    | go("tfidf", 0.90),
    "lima-3b-sft": LLAMA_3B | LIMA | SFT,
    "lima-3b-tfidf": LLAMA_3B | LIMA | go("tfidf", 0.90),
    "lima-3b-rho1": LLAMA_3B | LIMA | rho1(0.55),
    "lima-3b-llmlingua2": LLAMA_3B | LIMA | go("llmlingua2", 0.70, lam_min=0.07),
    "lima-8b-sft": LLAMA_8B | LIMA | SFT,
    "lima-8b-tfidf": LLAMA_8B | LIMA | go("tfidf", 0.85),
    "lima-8b-rho1": LLAMA_8B | LIMA | rho1(0.70),
    "lima-8b-llmlingua2": LLAMA_8B | LIMA | go("llmlingua2", 0.70),
    "alpaca-3b-sft": LLAMA_3B | ALPACA | SFT | dict(epochs=1, lr=6e-6),
    "alpaca-3b-tfidf": LLAMA_3B | ALPACA | go("tfidf", 0.70) | dict(epochs=1, lr=1e-6),
    "alpaca-3b-rho1": LLAMA_3B | ALPACA | rho1(0.70) | dict(epochs=1, lr=5e-7),
    "alpaca-3b-llmlingua2": LLAMA_3B | ALPACA | go("llmlingua2", 0.25) | dict(epochs=1, lr=6e-7),
    "alpaca-8b-sft": LLAMA_8B | ALPACA | SFT | dict(epochs=2, lr=1e-7),
    "alpaca-8b-tfidf": LLAMA_8B | ALPACA | go("tfidf", 0.60) | dict(epochs=2, lr=6e-7),
    "alpaca-8b-rho1": LLAMA_8B | ALPACA | rho1(0.40) | dict(epochs=2, lr=6e-7),
    "alpaca-8b-llmlingua2": LLAMA_8B | ALPACA | go("llmlingua2", 0.25, lam_min=0.05) | dict(epochs=2, lr=6e-7),
}

NOTES = {  # where the paper disagrees with itself
    "lima-3b-llmlingua2": "λ: §4 says 0.9 for LIMA; §5.3 decays it to 0.01, and its Table 4 has Table 1's score",
    "alpaca-3b-tfidf": "λ: §4 decays it from 0.9 for Alpaca",
    "alpaca-3b-llmlingua2": "λ: §4 decays it from 0.9 for Alpaca",
    "alpaca-8b-tfidf": "λ: §4 decays it from 0.9 for Alpaca",
}


def table() -> str:
    """The recipes, one a line, for the terminal."""
    head = ("recipe", "model", "grouper", "η", "λ", "objective", "epochs", "batch", "lr", "the paper elsewhere")
    rows = [head]
    for name, r in RECIPES.items():
        lam = (
            "–"
            if r["grouper"] == "rho1"
            else f"{r['lam_max']:g}" + (f" → {r['lam_min']:g}" if r.get("lam_min") else "")
        )
        eta, lam = ("", "") if r["grouper"] == "none" else (f"{r['eta'][0]:.2f}", lam)
        method = (r["grouper"], eta, lam, r.get("objective", "sft_go"))
        rows.append(
            (name, r["model"], *method, str(r["epochs"]), str(r["batch_size"]), f"{r['lr']:g}", NOTES.get(name, ""))
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for name, d in (("lima", LIMA), ("alpaca", ALPACA)):
        betas = " ".join(map(str, d["betas"]))
        adamw = f"AdamW, weight decay {d['weight_decay']}, betas {betas}, eps {d['eps']:g}"
        lines += [
            "",
            f"{name:<8}{d['data']}",
            f"        {adamw}; {d['schedule']}, warm-up {d['warmup_ratio']:g}; context {d['context']}",
        ]
    return "\n".join(
        [*lines, "", "Values are Appendix F's; it names no betas. rho1 needs --reference. Any flag overrides a recipe."]
    )
