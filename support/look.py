"""Which tokens do the groupers pick? Samples with them marked, in the terminal or as a page (Fig. 1a, 5-7).

    python -m support.look                                          the demo's data under TF-IDF
    python -m support.look --data FILE --model FOLDER --grouper tfidf,llmlingua2,rho1 --reference FOLDER --html FILE

`python PATH/support/look.py` is the same from any working directory.

T tokens of the samples shown and counted.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import data
import groupers
from data import END, Corpus
from model import LlamaConfig
from published.config import read_config
from published.hub import data_file, resolve
from published.tokenizer import Tokenizer
from published.weights import weight_files
from support.llmlingua2 import LLMLINGUA2, Classifier, keep_scores, need_transformers
from support.named import named
from support.ranks import command
from support.recipes import RECIPES
from support.report import groups_of_corpus, listed
from support.scores import check_reference, how_many, reference_nll, without_model

NAMES = tuple(name for name in groupers.GROUPERS if name != "none")
COLOURS = (43, 46, 42, 45, 41, 44)  # the terminal's, of the groups from 1 on, in turn


@dataclass
class View:
    """One grouper's verdicts on the samples looked at."""

    name: str
    scores: np.ndarray  # (T,) float32; of a grouper that gives no scores, its groups
    group: np.ndarray  # (T,) int, 0 ... K - 1 on supervised tokens
    rank: np.ndarray  # (T,) float, share of the sample's supervised tokens that score no higher; nan: not judged
    K: int = 2

    @property
    def picked(self) -> np.ndarray:
        """(T,) bool, above the lowest group: with two groups, important."""
        return self.group > 0

    def counts(self, mask: np.ndarray) -> np.ndarray:
        """(K,) the tokens of a mask that are in each group."""
        return np.bincount(self.group[mask], minlength=self.K)

    def shares(self, mask: np.ndarray) -> str:
        shares = [f"{n:.1%}" for n in self.counts(mask) / mask.sum()]
        return shares[1] if self.K == 2 else listed(shares, ", ")


def views(args: argparse.Namespace, corpus: Corpus, samples: np.ndarray, tokenizer: Tokenizer) -> list[View]:
    """Each grouper on these samples. Losses are those of --model as it is; training uses each step's own."""
    chosen, out = corpus.take(samples), []
    at = data.ragged(corpus.starts[samples], corpus.lengths[samples])
    mask, functions = chosen.loss_mask, [named(name, "--grouper") for name in args.grouper]
    looks = [getattr(grouper, "in_step", False) for grouper in functions]
    nats = losses(args.model, chosen, args) if any(looks) else None
    for grouper, in_step in zip(functions, looks):
        K = len(args.eta) + 1
        if grouper.name == "rho1":
            check_reference(args.reference, args.model, tokenizer, args.context)
            prior = losses(args.reference, chosen, args)
        elif grouper.name == "llmlingua2":  # reads each answer by itself, so the other samples are not needed
            prior = keep_scores(chosen, Classifier(resolve(args.llmlingua_model), device()))
        else:
            whole = without_model(grouper, corpus, args.seed)
            K, prior = how_many(grouper, whole, corpus.loss_mask, args.eta), whole[at]
        scores = grouper(torch.from_numpy(nats), torch.from_numpy(prior)).numpy() if in_step else prior
        group = np.where(mask, groups_of_corpus(grouper, args.eta, chosen, prior, nats), 0)
        rank = np.full(len(scores), np.nan)
        if scores.dtype.kind == "i":
            rank = group / max(K - 1, 1)
        for a, b in zip(chosen.starts, chosen.starts[1:]) if scores.dtype.kind == "f" else ():
            judged = a + np.flatnonzero(mask[a:b] & (scores[a:b] > -np.inf))
            rank[judged] = np.searchsorted(np.sort(scores[judged]), scores[judged], "right") / max(len(judged), 1)
        out.append(View(grouper.name.split("/")[-1], scores, group, rank, K))
    return out


def losses(folder: str, corpus: Corpus, args: argparse.Namespace) -> np.ndarray:
    folder = resolve(folder)
    if not weight_files(folder):
        raise ValueError(f"{folder}: no weights in the folder, so no losses to look at")
    return reference_nll(folder, args.dtype, device(), corpus, 2 * args.context)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pieces(corpus: Corpus, sample: int) -> tuple[str, list[tuple[int, str]]]:
    """A sample as the text before its first supervised token, and (place, text) of each token from there.

    A character split over several tokens is shown with the first of them, a space that no span covers with the token
    after it.
    """
    a, b = corpus.starts[sample], corpus.starts[sample + 1]
    first = a + int(corpus.loss_mask[a:b].argmax())
    begin = shown = corpus.spans[first - 1, 1] if first > a else corpus.spans[a, 0]
    out = []
    for place, (_, end) in enumerate(corpus.spans[first:b], first):
        out.append((place, "■" if corpus.kind[place] == END else corpus.text[shown:end]))
        shown = max(shown, end)
    return corpus.text[corpus.spans[a, 0] : begin], out


def name_of(corpus: Corpus, sample: int) -> str:
    """The sample's row in the file, and which piece of it where a long text was cut into pieces."""
    of_row = np.flatnonzero(corpus.rows == corpus.rows[sample])
    return f"row {corpus.rows[sample]}" + f", piece {sample - of_row[0] + 1}" * (len(of_row) > 1)


# In the terminal.


def marked(corpus: Corpus, answer: list[tuple[int, str]], view: View, colour: bool) -> str:
    """An answer with the tokens of groups above 0 in colour or in brackets, and what is not trained on dim."""
    begin = {-1: "\x1b[2m" if colour else "", 0: ""}  # -1: not trained on
    for k in range(1, view.K):
        begin[k] = f"\x1b[1;30;{COLOURS[(k - 1) % len(COLOURS)]}m" if colour else "[" + f"{k}:" * (view.K > 2)
    end = {k: "" if not text else "\x1b[0m" if colour else "]" for k, text in begin.items()}
    out, was = [], 0
    for place, text in answer:
        state = int(view.group[place]) if corpus.loss_mask[place] else -1
        text = printable(text)
        if not text:  # a later byte of a character that is shown
            continue
        if state > 0 and text.isspace():
            text = text.replace("\n", "⏎\n")  # so that there is something to mark
        if state != was:
            space = "" if text.isspace() else re.match(r"\s*", text)[0]  # a mark begins after the space before a word
            out += [end[was], space, begin[state]]
            text = text[len(space) :]
        out.append(text)
        was = state
    return "".join(out) + end[was]


def printable(text: str) -> str:
    """Without the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)


def summary(corpus: Corpus, looked: list[View], tokenizer: Tokenizer) -> list[str]:
    """Lines about all samples counted: shares, what is picked most, overlaps."""
    mask = corpus.loss_mask
    lines = [f"counted over {len(corpus):,} samples, {mask.sum():,} supervised tokens"]
    wide = max(10, *(len(view.name) for view in looked)) + 1
    for view in looked:
        often = ", ".join(most_picked(corpus, view, tokenizer))
        lines.append(
            f"  {view.name:<{wide}}{view.shares(mask):>6} {kind(view)}" + f"; most often {often}" * bool(often)
        )
    if len(looked) > 1:
        lines.append("overlap: of the tokens that the row picks, the share that the column picks too")
        lines.append(" " * (wide + 2) + "".join(f"{v.name:>{wide + 1}}" for v in looked))
        lines += [
            f"  {a.name:<{wide}}" + "".join(f"{share:>{wide + 1}.0%}" for share in overlaps(a, looked)) for a in looked
        ]
    return lines


def kind(view: View) -> str:
    return "important" if view.K == 2 else f"in group {listed([*map(str, range(view.K))], ', ')}"


def most_picked(corpus: Corpus, view: View, tokenizer: Tokenizer, n: int = 8) -> list[str]:
    """The tokens it picks most often, each with its share of all that it picks."""
    ids, counts = np.unique(corpus.ids[view.picked], return_counts=True)
    most = counts.argsort(kind="stable")[::-1][:n]
    texts = [tokenizer.backend.decode([i], skip_special_tokens=False) for i in ids[most]]
    return [f"{text!r} {n / counts.sum():.1%}" for text, n in zip(texts, counts[most])]


def overlaps(a: View, looked: list[View]) -> list[float]:
    return [(a.picked & b.picked).sum() / max(a.picked.sum(), 1) for b in looked]


# As a page.

# How it begins.
PAGE = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="support.look">'
STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 0 auto; max-width: 110rem; padding: 1rem }
body { color: #1a1a1a; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem } h3 { font-size: .95rem; margin: 0 0 .4rem }
.sample { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd; border-radius: 6px; padding: .7rem }
.prompt { color: #6b6b6b } b { border-bottom: 2px solid #b3261e }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start }
.tables div { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse } th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap }
th:first-child, td.words { text-align: left } caption { text-align: left; color: #555; padding-bottom: .3rem }
.scale { display: inline-block; width: 9rem; height: .9rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(38 110 190 / 0), rgb(38 110 190 / .6)) }
"""


def page(corpus: Corpus, shown: list[int], looked: list[View], tokenizer: Tokenizer, title: str) -> str:
    """One self-contained page; whatever the data hold is text in it, never markup."""
    mask, total = corpus.loss_mask, int(corpus.loss_mask.sum())
    picked = [", ".join(most_picked(corpus, view, tokenizer, 5)) for view in looked]
    names, several = [escape(view.name) for view in looked], any(view.K > 2 for view in looked)
    of = "groups" if several else "important"
    shares = [
        f'<tr><th>{name}<td>{view.shares(mask)}<td class="words">{escape(words)}'
        for name, view, words in zip(names, looked, picked)
    ]
    overlap = [
        f"<tr><th>{name}" + "".join(f"<td>{share:.0%}" for share in overlaps(view, looked))
        for name, view in zip(names, looked)
    ]
    out = [
        PAGE,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
        '<p>Shade: rank of the score among the answer\'s tokens, low <span class="scale"></span> high;',
        f"<b>underlined</b>: {'above group 0, a number its group' if several else 'important'};",
        '<span class="prompt">grey</span>: not trained on; ■: end token.',
        "Hover over a token for its score.",
        f'<div class="tables"><div><table><caption>Share of {total:,} supervised tokens',
        f'({len(corpus):,} samples)</caption><tr><th>grouper<th>{of}<td class="words">picked most often',
        *shares,
        "</table></div><div><table>",
        "<caption>Of the row's underlined tokens, the share also underlined by the column</caption>",
        "<tr><th>" + "".join(f"<th>{name}" for name in names),
        *overlap,
        "</table></div></div>",
    ]
    for sample in shown:
        prompt, answer = pieces(corpus, sample)
        out.append(f'<h2>{escape(name_of(corpus, sample))}</h2><p class="text prompt">{escape(prompt)}</p>')
        out.append('<div class="sample">')
        for name, view in zip(names, looked):
            texts = "".join(token(corpus, place, text, view) for place, text in answer)
            out.append(f'<section class="text"><h3>{name}</h3>{texts}</section>')
        out.append("</div>")
    return "\n".join(out) + "</html>\n"


def token(corpus: Corpus, place: int, text: str, view: View) -> str:
    if not corpus.loss_mask[place]:
        return f'<span class="prompt">{escape(text)}</span>' if text else ""
    k, rank, score = view.group[place], view.rank[place], view.scores[place]
    tag, shown = "b" if k else "span", escape(text) + f"<sub>{k}</sub>" * bool(k > 0 and view.K > 2)
    of = f"group {k}, " * (view.K != 2)
    told = f"score {score:.4g}, rank {rank:.0%}" if view.scores.dtype.kind == "f" else "given"
    if np.isnan(rank):
        return f'<{tag} title="{of}not judged">{shown}</{tag}>'
    shade = f"background:rgb(38 110 190/{0.6 * rank:.2f})"
    return f'<{tag} style="{shade}" title="{of}{told}">{shown}</{tag}>'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    about = "Show which tokens the groupers pick, in the terminal and, with --html, as a page."
    shape = partial(argparse.HelpFormatter, max_help_position=30, width=110)
    parser = argparse.ArgumentParser("python -m support.look", None, about, allow_abbrev=False, formatter_class=shape)
    demo = RECIPES["demo"]

    def flag(name: str, kind, default, metavar: str | None, help: str, **how) -> None:
        help += f" (default: {default})" if isinstance(default, str | int | float) and "default" not in help else ""
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=help, **how)

    flag("--data", str, demo["data"], "FILE", "training data, as train.py takes it (default: the demo's)")
    flag("--model", str, demo["model"], "FOLDER", "whose tokenizer, and whose losses, to use (default: the demo's)")
    flag("--grouper", str, "tfidf", "A,B,…", f"any of {', '.join(NAMES)}, or FILE.py:NAME of a function")
    flag(
        "--eta",
        float,
        (0.9,),
        "X",
        "percentile: 0.9 makes each sample's top 10 %% important; two: three groups",
        nargs="+",
    )
    flag("--row", int, None, "N", "rows of the file to show, from 1 (default: the first 3 samples)", nargs="+")
    flag("--stats", int, 50, "N", "samples to count shares and overlaps over, besides those shown")
    flag("--html", str, None, "FILE", "write a page too")
    flag("--reference", str, None, "FOLDER", "rho1: the frozen reference model")
    flag("--llmlingua-model", str, LLMLINGUA2, "FOLDER", "llmlingua2: its token classifier (default: mBERT's)")
    flag("--template", str, "auto", None, "how a row becomes text", choices=("auto", *data.TEMPLATES))
    flag("--context", int, 4096, "N", "tokens a sample is cut to")
    flag("--dtype", str, "bfloat16", None, "compute type of losses", choices=("bfloat16", "float32"))
    flag("--seed", int, 0, "N", "of the random grouper")
    args = parser.parse_args(argv)
    args.grouper = args.grouper.split(",")
    for name in args.grouper:
        if name not in NAMES and ":" not in name:
            raise ValueError(f"--grouper {name}: expected one of {', '.join(NAMES)}, or FILE.py:NAME")
        named(name, "--grouper")
    if "rho1" in args.grouper and not args.reference:
        parser.error("--grouper rho1 needs --reference, a model trained on data of the same domain")
    if args.stats < 0 or args.context < 2:
        parser.error(f"--stats {args.stats} --context {args.context}: expected at least 0 samples and 2 tokens")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        parser.error(f"--html {args.html}: no such folder; create it first")
    if args.html and Path(args.html).is_dir():
        parser.error(f"--html {args.html}: a folder, expected a file")
    if args.html and Path(args.html).is_file():  # not /dev/stdout
        with open(args.html, "rb") as f:
            if f.read(len(PAGE)) not in (PAGE.encode(), b""):
                parser.error(f"--html {args.html}: exists, and is no page of support.look; choose another name")
    return args


def look(args: argparse.Namespace) -> None:
    if "llmlingua2" in args.grouper:
        need_transformers()
    folder = resolve(args.model)
    llama = LlamaConfig(**read_config(folder))
    tokenizer = Tokenizer(folder, llama.vocab_size)
    corpus = data.load_corpus(data_file(args.data), tokenizer, args.template, args.context)
    looks = any(getattr(named(name, "--grouper"), "in_step", False) for name in args.grouper)
    if args.context > (room := llama.max_position_embeddings) and looks:
        raise ValueError(f"--context {args.context}: {args.model} has {room} positions (max_position_embeddings)")
    shown = np.arange(min(3, len(corpus)))
    if args.row:
        if missing := sorted(set(args.row) - set(corpus.rows.tolist())):
            found = f"is not among the {len(corpus):,} samples (rows count from 1)"
            raise ValueError(f"{args.data}: row {missing[0]} {found}")
        shown = np.unique([i for row in args.row for i in np.flatnonzero(corpus.rows == row)[:3]])  # 3 pieces of a text
    samples = np.union1d(shown, np.arange(min(args.stats, len(corpus))))
    looked, chosen = views(args, corpus, samples, tokenizer), corpus.take(samples)
    shown = np.searchsorted(samples, shown).tolist()
    if args.html:
        title = f"{Path(args.data).name}, η {' '.join(f'{eta:g}' for eta in args.eta)}"
        Path(args.html).write_text(page(chosen, shown, looked, tokenizer, title), encoding="utf-8")
        print(f"wrote {args.html}")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for sample in shown:
        supervised = chosen.loss_mask & (chosen.doc_ids == sample)
        prompt, answer = pieces(chosen, sample)
        print(f"══ {name_of(chosen, sample)} ══\n{printable(prompt)}\n")
        for view in looked:
            counts = [f"{n:,}" for n in view.counts(supervised)]
            picked = counts[1] if view.K == 2 else listed(counts, ", ")
            print(f"── {view.name}: {picked} of {supervised.sum():,} tokens {kind(view)} ──")
            print(f"{marked(chosen, answer, view, colour)}\n")
    print("\n".join(summary(chosen, looked, tokenizer)))


def program() -> None:
    try:
        look(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    command(program, "lower --context", "interrupted")


if __name__ == "__main__":
    main()
