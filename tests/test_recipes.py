"""support/recipes.py: Appendix F, typed here a second time, and each recipe as a short run."""

import json

import pytest
from classifiers import MBERT, classifier_folder
from tiny import TEXTS, tiny_folder

import train
from published.hub import data_file
from support.recipes import NOTES, RECIPES, table

# data, size, method: eta, lam_max, lam_min, objective, epochs, batch size, lr, warm-up ratio, weight decay, second beta
APPENDIX_F = """
    lima   3b sft        -    0   0    cross_entropy  15 64 1e-5 0    0.1  0.95
    lima   3b tfidf      0.90 0.9 0.9  sft_go         15 64 1e-5 0    0.1  0.95
    lima   3b rho1       0.55 1   1    important_only 15 64 1e-5 0    0.1  0.95
    lima   3b llmlingua2 0.70 0.9 0.07 sft_go         15 64 1e-5 0    0.1  0.95
    lima   8b sft        -    0   0    cross_entropy  15 64 1e-5 0    0.1  0.95
    lima   8b tfidf      0.85 0.9 0.9  sft_go         15 64 1e-5 0    0.1  0.95
    lima   8b rho1       0.70 1   1    important_only 15 64 1e-5 0    0.1  0.95
    lima   8b llmlingua2 0.70 0.9 0.9  sft_go         15 64 1e-5 0    0.1  0.95
    alpaca 3b sft        -    0   0    cross_entropy  1  32 6e-6 0.07 0.05 0.999
    alpaca 3b tfidf      0.70 0.9 0.9  sft_go         1  32 1e-6 0.07 0.05 0.999
    alpaca 3b rho1       0.70 1   1    important_only 1  32 5e-7 0.07 0.05 0.999
    alpaca 3b llmlingua2 0.25 0.9 0.9  sft_go         1  32 6e-7 0.07 0.05 0.999
    alpaca 8b sft        -    0   0    cross_entropy  2  32 1e-7 0.07 0.05 0.999
    alpaca 8b tfidf      0.60 0.9 0.9  sft_go         2  32 6e-7 0.07 0.05 0.999
    alpaca 8b rho1       0.40 1   1    important_only 2  32 6e-7 0.07 0.05 0.999
    alpaca 8b llmlingua2 0.25 0.9 0.05 sft_go         2  32 6e-7 0.07 0.05 0.999
"""
ROWS = [line.split() for line in APPENDIX_F.strip().splitlines()]
HUB = {
    "3b": "meta-llama/Llama-3.2-3B",
    "8b": "meta-llama/Llama-3.1-8B",
    "lima": "hf://datasets/GAIR/lima/train.jsonl",
    "alpaca": "hf://datasets/yahma/alpaca-cleaned/alpaca_data_cleaned.json",
}


@pytest.mark.fast
def test_there_are_sixteen_and_the_demo():
    names = {f"{data}-{size}-{method}" for data, size, method, *_ in ROWS}
    assert {"demo", *names} == RECIPES.keys() and len(ROWS) == len(names) == 16
    assert NOTES.keys() <= RECIPES.keys()


@pytest.mark.fast
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_recipe_resolves_to_the_papers_values(row):
    data, size, method, eta, lam_max, lam_min, objective, epochs, batch, lr, warmup, decay, beta = row
    reference = ["--reference", "phi"] if method == "rho1" else []
    cfg = train.parse_args(["--recipe", f"{data}-{size}-{method}", *reference])
    assert (cfg.model, cfg.data) == (HUB[size], HUB[data])
    assert cfg.grouper == ("none" if method == "sft" else method) and (eta == "-" or cfg.eta == (float(eta),))
    assert (cfg.lam_max, cfg.lam_min, cfg.objective) == (float(lam_max), float(lam_min), objective)
    assert (cfg.epochs, cfg.batch_size) == (int(epochs), int(batch))
    assert (cfg.lr, cfg.warmup_ratio) == (float(lr), float(warmup))
    assert (cfg.weight_decay, cfg.betas, cfg.eps) == (float(decay), (0.9, float(beta)), 1e-8)
    assert (cfg.context, cfg.schedule, cfg.scope, cfg.template, cfg.clip) == (4096, "cosine", "step", "auto", 1.0)
    overridden = train.parse_args(["--recipe", cfg.recipe, *reference, "--lam-max", "0.95", "--lr", "1"])
    assert (overridden.lr, overridden.lam_max, overridden.epochs) == (1, 0.95, cfg.epochs), "a flag overrides it"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, a classifier, and rows of both data sets' forms."""
    pytest.importorskip("transformers")
    here = tmp_path_factory.mktemp("tiny")
    tiny_folder(here / "model", seed=9)
    classifier_folder(here, MBERT, TEXTS * 4)
    texts = [f"{text} {n}." for n, text in enumerate(TEXTS * 2)]
    lima = [{"conversations": ["Why?", text], "source": "test"} for text in texts]
    alpaca = [{"instruction": "Say it.", "input": "It." * (n % 2), "output": text} for n, text in enumerate(texts)]
    (here / "lima").write_text("\n".join(map(json.dumps, lima)))
    (here / "alpaca").write_text(json.dumps(alpaca))
    return here


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"demo"}))
def test_a_recipe_runs_two_steps_on_a_tiny_model(tiny, tmp_path, recipe):
    reference = f" --reference {tiny / 'model'}" * recipe.endswith("-rho1")
    flags = f"--recipe {recipe} --model {tiny / 'model'} --data {tiny / recipe.split('-')[0]} --batch-size 4"
    flags += f" --max-steps 2 --checkpoint-every 0 --llmlingua-model {tiny / MBERT} --out {tmp_path / 'out'}{reference}"
    out = train.train(train.parse_args(flags.split()))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and (out / "model" / "model.safetensors").is_file()
    assert rows[0]["lam"] == RECIPES[recipe]["lam_max"] and (rows[0]["important"] is None) == recipe.endswith("-sft")
    for row in rows:
        go = (1 - row["lam"]) * row["ce"] + row["lam"] * row[row["worst"]]
        expected = {"sft_go": go, "cross_entropy": row["ce"], "important_only": row["important"]}
        assert row["loss"] == pytest.approx(expected[RECIPES[recipe].get("objective", "sft_go")], abs=1e-5)


@pytest.mark.fast
def test_the_list_shows_every_recipe_and_where_the_paper_disagrees_with_itself(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--recipe", "list"])
    said = capsys.readouterr().out
    assert e.value.code in (None, 0) and said == table() + "\n"
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert RECIPES.keys() <= lines.keys()
    assert "betas 0.9 0.999" in said and "warm-up 0.07; context 4096" in said
    assert "55  –  " in lines["lima-3b-rho1"] and "important_only" in lines["lima-3b-rho1"]
    assert "0.70  0.9 → 0.07" in lines["lima-3b-llmlingua2"] and "§5.3 decays it to 0.01" in lines["lima-3b-llmlingua2"]
    assert "§4 decays it" in lines["alpaca-8b-tfidf"] and "§" not in lines["lima-3b-tfidf"]


@pytest.mark.fast
def test_a_missing_download_is_one_message_with_the_command_that_fetches_it(monkeypatch, tmp_path):
    def refuse(*a, **k):
        raise OSError("no network\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    recipe = ["--recipe", "lima-3b-tfidf"]
    with pytest.raises(ValueError) as e:
        train.train(train.parse_args(recipe))
    assert "(no network)" in str(e.value) and "long story" not in str(e.value)
    assert '\n  hf download meta-llama/Llama-3.2-3B --exclude "original/*"\n' in str(e.value)
    assert "hf auth login" in str(e.value)
    with pytest.raises(ValueError) as e:
        data_file("hf://datasets/yahma/alpaca-cleaned/alpaca_data_cleaned.json")
    assert str(e.value).endswith("hf download yahma/alpaca-cleaned alpaca_data_cleaned.json --repo-type dataset")
    with pytest.raises(ValueError, match=r"hf download GAIR/lima train\.jsonl --repo-type dataset\nIt is gated"):
        train.train(train.parse_args([*recipe, "--model", str(tiny_folder(tmp_path / "model"))]))


@pytest.mark.fast
def test_a_data_set_of_the_hub_is_fetched_by_its_name_and_other_addresses_are_refused(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert data_file("hf://datasets/GAIR/lima/some/train.jsonl") == tmp_path / "some" / "train.jsonl"
    assert asked == [(("GAIR/lima",), {"allow_patterns": ["some/train.jsonl"], "repo_type": "dataset"})]
    for bad in ("hf://GAIR/lima", "hf://models/GAIR/lima/train.jsonl", "hf://datasets/GAIR/lima", "hf://"):
        with pytest.raises(ValueError, match="has the form hf://datasets/"):
            data_file(bad)
