"""Thirteen short runs against what commit dedf155 made of them: every step's metrics, and the sum and norm of each final weight.

`golden.json` was written by that commit's code: `python tests/test_golden.py` (there with its own spelling of two flags). Written
again by later code it would prove nothing, so the program refuses to.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from classifiers import MBERT, classifier_folder
from safetensors.torch import load_file
from tiny import TEXTS, tiny_folder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train

GOLDEN = Path(__file__).with_name("golden.json")
NUMBERS = ("loss", "ce", "important", "unimportant", "grad_norm", "lr", "lam")
COUNTS = ("step", "epoch", "important_tokens", "unimportant_tokens", "tokens", "worst")
BASE = "--context 128 --micro-batch-tokens 512 --batch-size 4 --epochs 9 --lr 3e-3 --dtype float32 --seed 3 --eps 1e-5"
BASE += " --max-steps 12 --checkpoint-every 0 --save-dtype float32"
MANY = "--lam-max {} --batch-size 12 --context 90 --micro-batch-tokens 89"
CASES = {
    "tfidf": "--grouper tfidf --eta 0.7 --lam-max 0.9",
    "frequency, decaying": "--grouper frequency --eta 0.7 --lam-max 0.9 --lam-min 0.1",
    "random": "--grouper random --eta 0.5 --lam-max 1",
    "loss": "--grouper loss --eta 0.7 --lam-max 0.9",
    "rho1 in Eq. 3": "--grouper rho1 --eta 0.55 --lam-max 0.9 --reference {phi}",
    "rho1's own row": "--grouper rho1 --eta 0.55 --objective important_only --lam-max 1 --reference {phi}",
    "sft": "--grouper none --lam-max 0",
    "tfidf, watched": "--grouper tfidf --eta 0.7 --lam-max 0",
    "many micro-batches": "--grouper loss --eta 0.7 " + MANY.format(0.9),
    "many, watched": "--grouper tfidf --eta 0.7 " + MANY.format(0),
    "scope micro_batch": "--grouper loss --eta 0.7 --lam-max 0.9 --scope micro_batch --micro-batch-tokens 127",
    "recompute, clipped": "--grouper tfidf --eta 0.7 --clip 0.5 --checkpoint-activations",
    "llmlingua2": "--grouper llmlingua2 --eta 0.5 --lam-max 0.9 --lam-min 0.07 --llmlingua-model {classifier}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("golden"))


def lay_out(here: Path) -> dict[str, Path]:
    """A tiny model, a reference, a classifier, the demo's first rows."""
    folder, phi, rows = tiny_folder(here / "model", seed=3), tiny_folder(here / "phi", seed=9), here / "rows.jsonl"
    first = (ROOT / "demo" / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:13]
    rows.write_text("\n".join(first), encoding="utf-8")
    return {"folder": folder, "phi": phi, "rows": rows, "here": here}


def run(place: dict[str, Path], name: str) -> dict:
    """One case, in this process, on one thread."""
    if name == "llmlingua2":
        pytest.importorskip("transformers")
        place = place | {"classifier": classifier_folder(place["here"], MBERT, TEXTS * 4)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = place["here"] / f"out {list(CASES).index(name)}"
        flags = f"--model {place['folder']} --data {place['rows']} {BASE} {CASES[name].format(**place)}".split()
        train.train(train.parse_args([*flags, "--out", str(out)]))
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = {n: w.double() for n, w in load_file(out / "model" / "model.safetensors").items()}
    return {
        "steps": [{key: row[key] for key in NUMBERS + COUNTS} for row in rows],
        "weights": {n: [float(w.sum()), float(w.norm())] for n, w in weights.items()},
    }


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_what_it_was_before_the_house_was_rebuilt(place, name):
    was, now = json.loads(GOLDEN.read_text())[name], run(place, name)
    assert len(now["steps"]) == len(was["steps"]) == 12
    for a, b in zip(was["steps"], now["steps"]):
        assert [a[key] for key in COUNTS] == [b[key] for key in COUNTS]
        for key in NUMBERS:
            assert a[key] is b[key] is None or abs(a[key] - b[key]) <= 5e-6, (a["step"], key)
    assert was["weights"].keys() == now["weights"].keys()
    for weight, numbers in was["weights"].items():
        for a, b in zip(numbers, now["weights"][weight]):  # a sum may cancel: its rounding goes by the norm
            assert math.isclose(a, b, rel_tol=5e-6, abs_tol=5e-6 * numbers[1]), weight


if __name__ == "__main__":
    import tempfile

    if GOLDEN.exists():
        sys.exit(f"error: {GOLDEN} is there; it is only worth something as commit dedf155 wrote it")
    with tempfile.TemporaryDirectory() as folder:
        place = lay_out(Path(folder))
        found = {name: run(place, name) for name in CASES}
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
