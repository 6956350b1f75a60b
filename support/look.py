"""What do the groupers pick? Samples with their important tokens marked, in the terminal and as one HTML page (Figures 1a, 5-7).

    python groupers.py                                              the demo's data under TF-IDF
    python groupers.py --data FILE --model FOLDER --grouper tfidf,llmlingua2,rho1 --reference FOLDER --eta 0.9 --html FILE

Off the reading path; runs as `python groupers.py`.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch

import data
import groupers
from data import END, Corpus, Tokenizer
from files import resolve, weight_files
from model import DTYPES, Llama, LlamaConfig
from recipes import RECIPES
from train import check_reference, corpus_nll

NAMES = groupers.GROUPERS[1:]  # all but "none"


@dataclass
class View:
    """One grouper's scores and verdicts on the samples looked at."""

    name: str
    scores: np.ndarray  # (T,) float32
    important: np.ndarray  # (T,) bool
    rank: np.ndarray  # (T,) float, share of the sample's supervised tokens that score no higher; nan: not judged


def views(args: argparse.Namespace, corpus: Corpus, samples: np.ndarray, tokenizer: Tokenizer) -> list[View]:
    """Each grouper on these samples of the corpus. A loss is that of the model as it is now, where training looks at each step."""
    chosen, out = corpus.take(samples), []
    at = data.ragged(corpus.starts[samples], corpus.lengths[samples])
    mask, doc_ids = torch.from_numpy(chosen.loss_mask), torch.from_numpy(chosen.doc_ids)
    if set(args.grouper) & set(groupers.IN_STEP):
        nats = losses(args.model, chosen, args)
    for name in args.grouper:
        if name == "loss":
            scores = nats
        elif name == "rho1":
            check_reference(args, tokenizer)
            scores = nats - losses(args.reference, chosen, args)
        elif name == "llmlingua2":  # reads each answer by itself, so it need not read the others
            device = "cuda" if torch.cuda.is_available() else "cpu"
            scores = groupers.llmlingua2(chosen, groupers.Classifier(resolve(args.llmlingua_model), device))
        else:
            scores = groupers.score_corpus(name, corpus, args.seed, args.cache)[at]
        important = groupers.important(torch.from_numpy(scores), mask, doc_ids, args.eta).numpy()
        rank = np.full(len(scores), np.nan)
        for a, b in zip(chosen.starts, chosen.starts[1:]):
            judged = a + np.flatnonzero(chosen.loss_mask[a:b] & (scores[a:b] > -np.inf))
            rank[judged] = np.searchsorted(np.sort(scores[judged]), scores[judged], "right") / max(len(judged), 1)
        out.append(View(name, scores, important, rank))
    return out


def losses(folder: str, corpus: Corpus, args: argparse.Namespace) -> np.ndarray:
    folder, dtype = resolve(folder), DTYPES[args.dtype]
    if not weight_files(folder):
        raise ValueError(f"{folder}: no weights in the folder, so no losses to look at")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return corpus_nll(Llama.from_pretrained(folder, dtype, dtype, device), corpus, 2 * args.context)


def pieces(corpus: Corpus, sample: int) -> tuple[str, list[tuple[int, str]]]:
    """A sample as what comes before its first supervised token, and (place, text) of each token from there.

    A character split over tokens is shown with the first of them; a space that a token's span leaves out, with that token.
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
    """Which row of the file it is, and which piece of it where a long text was cut into pieces."""
    of_row = np.flatnonzero(corpus.rows == corpus.rows[sample])
    return f"row {corpus.rows[sample]}" + f", piece {sample - of_row[0] + 1}" * (len(of_row) > 1)


# In the terminal.


def marked(corpus: Corpus, answer: list[tuple[int, str]], view: View, colour: bool) -> str:
    """An answer with its important tokens in colour or in brackets, and what is not trained on dim."""
    on, off, dim, plain = ("\x1b[1;30;43m", "\x1b[0m", "\x1b[2m", "\x1b[0m") if colour else ("[", "]", "", "")
    begin, end = {"important": on, "prompt": dim, "other": ""}, {"important": off, "prompt": plain, "other": ""}
    out, was = [], "other"
    for place, text in answer:
        state = ("important" if view.important[place] else "other") if corpus.loss_mask[place] else "prompt"
        text = printable(text)
        if not text:  # a later byte of a character that is shown
            continue
        if state == "important" and text.isspace():
            text = text.replace("\n", "⏎\n")  # so that there is something to mark
        if state != was:
            space = (
                "" if text.isspace() else re.match(r"\s*", text)[0]
            )  # a mark begins at the word, not before its space
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
    for view in looked:
        lines.append(
            f"  {view.name:<11}{view.important[mask].mean():6.1%} important; most often {', '.join(most_picked(corpus, view, tokenizer))}"
        )
    if len(looked) > 1:
        lines += [
            "overlap: of the tokens that the row picks, the share that the column picks too",
            " " * 13 + "".join(f"{v.name:>12}" for v in looked),
        ]
        lines += [f"  {a.name:<11}" + "".join(f"{share:>12.0%}" for share in overlaps(a, looked)) for a in looked]
    return lines


def most_picked(corpus: Corpus, view: View, tokenizer: Tokenizer, n: int = 8) -> list[str]:
    """The tokens it picks most often, each with its share of all that it picks."""
    ids, counts = np.unique(corpus.ids[view.important], return_counts=True)
    most = counts.argsort(kind="stable")[::-1][:n]
    return [
        f"{tokenizer.backend.decode([i], skip_special_tokens=False)!r} {c / counts.sum():.1%}"
        for i, c in zip(ids[most], counts[most])
    ]


def overlaps(a: View, looked: list[View]) -> list[float]:
    return [(a.important & b.important).sum() / max(a.important.sum(), 1) for b in looked]


# As a page.

STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 0 auto; max-width: 110rem; padding: 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem } h3 { font-size: .95rem; margin: 0 0 .4rem }
.sample { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd; border-radius: 6px; padding: .7rem }
.prompt { color: #6b6b6b } b { border-bottom: 2px solid #b3261e }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start } .tables div { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse } th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap }
th:first-child, td.words { text-align: left } caption { text-align: left; color: #555; padding-bottom: .3rem }
.scale { display: inline-block; width: 9rem; height: .9rem; vertical-align: middle;
  background: linear-gradient(90deg, rgb(38 110 190 / 0), rgb(38 110 190 / .6)) }
"""


def page(corpus: Corpus, shown: list[int], looked: list[View], tokenizer: Tokenizer, title: str) -> str:
    """One self-contained page; whatever the data hold is text in it, never markup."""
    mask, total = corpus.loss_mask, int(corpus.loss_mask.sum())
    shares = "".join(
        f'<tr><th>{v.name}<td>{v.important[mask].mean():.1%}<td class="words">{escape(", ".join(most_picked(corpus, v, tokenizer, 5)))}'
        for v in looked
    )
    head = "".join(f"<th>{v.name}" for v in looked)
    overlap = "".join(
        f"<tr><th>{a.name}" + "".join(f"<td>{share:.0%}" for share in overlaps(a, looked)) for a in looked
    )
    out = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
        '<p>Shade: rank of the score among the answer\'s tokens, low <span class="scale"></span> high; <b>underlined</b>: important; '
        '<span class="prompt">grey</span>: not trained on; ■: end token. Hover over a token for its score.',
        f'<div class="tables"><div><table><caption>Share of {total:,} supervised tokens ({len(corpus):,} samples)</caption>',
        f'<tr><th>grouper<th>important<td class="words">picked most often{shares}</table></div>',
        "<div><table><caption>Of the row's important tokens, the share also important to the column</caption>",
        f"<tr><th>{head}{overlap}</table></div></div>",
    ]
    for sample in shown:
        prompt, answer = pieces(corpus, sample)
        out.append(
            f'<h2>{escape(name_of(corpus, sample))}</h2><p class="text prompt">{escape(prompt)}</p><div class="sample">'
        )
        for view in looked:
            texts = "".join(token(corpus, place, text, view) for place, text in answer)
            out.append(f'<section class="text"><h3>{view.name}</h3>{texts}</section>')
        out.append("</div>")
    return "\n".join(out) + "</html>\n"


def token(corpus: Corpus, place: int, text: str, view: View) -> str:
    if not corpus.loss_mask[place]:
        return f'<span class="prompt">{escape(text)}</span>' if text else ""
    tag, rank, score = "b" if view.important[place] else "span", view.rank[place], view.scores[place]
    if np.isnan(rank):
        return f'<{tag} title="not judged">{escape(text)}</{tag}>'
    shade = f"background:rgb(38 110 190/{0.6 * rank:.2f})"
    return f'<{tag} style="{shade}" title="score {score:.4g}, rank {rank:.0%}">{escape(text)}</{tag}>'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="groupers.py",
        description="Show which tokens the groupers pick, in the terminal and, with --html, as a page.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    demo, flag = RECIPES["demo"], parser.add_argument
    flag(
        "--data", default=demo["data"], metavar="FILE", help="training data, as train.py takes it (default: the demo's)"
    )
    flag(
        "--model",
        default=demo["model"],
        metavar="FOLDER",
        help="whose tokenizer, and whose losses, to use (default: the demo's)",
    )
    flag(
        "--grouper",
        default="tfidf",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help=f"any of {', '.join(NAMES)} (default: tfidf)",
    )
    flag(
        "--eta",
        default=0.9,
        type=float,
        metavar="X",
        help="percentile: 0.9 makes each sample's top 10 %% important (default: 0.9)",
    )
    flag(
        "--row",
        type=int,
        nargs="+",
        metavar="N",
        help="rows of the file to show, counted from 1, of a long text its first 3 pieces (default: 3 samples)",
    )
    flag(
        "--stats",
        default=50,
        type=int,
        metavar="N",
        help="samples to count shares and overlaps over, besides those shown (default: 50)",
    )
    flag("--html", metavar="FILE", help="write a page too")
    flag("--reference", metavar="FOLDER", help="rho1: the frozen reference model")
    flag(
        "--llmlingua-model",
        default=groupers.LLMLINGUA2,
        metavar="FOLDER",
        help="llmlingua2: its token classifier (default: mBERT's)",
    )
    flag("--template", default="auto", choices=("auto", *data.TEMPLATES), help="how a row becomes text (default: auto)")
    flag("--context", default=4096, type=int, metavar="N", help="tokens a sample is cut to (default: 4096)")
    flag(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="compute type of losses (default: bfloat16)",
    )
    flag("--seed", default=0, type=int, help="of the random grouper (default: 0)")
    flag("--cache", type=Path, metavar="DIR", help="folder of tokens and scores to keep (default: none)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.grouper if name not in NAMES]:
        parser.error(f"--grouper {','.join(args.grouper)}: no grouper {unknown[0]!r}; choose among {', '.join(NAMES)}")
    if "rho1" in args.grouper and not args.reference:
        parser.error("--grouper rho1 needs --reference, a model trained on data of the same domain")
    if args.stats < 0 or args.context < 2:
        parser.error(f"--stats {args.stats} --context {args.context}: expected at least 0 samples and 2 tokens")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        parser.error(f"--html {args.html}: no such folder; create it first")
    return args


def look(args: argparse.Namespace) -> None:
    if "llmlingua2" in args.grouper:
        groupers.need_transformers()
    folder = resolve(args.model)
    llama = LlamaConfig.from_folder(folder)
    tokenizer = Tokenizer(folder, llama.vocab_size)
    corpus = data.load_corpus(data.data_file(args.data), tokenizer, args.template, args.context, args.cache)
    if args.context > llama.max_position_embeddings and set(args.grouper) & set(groupers.IN_STEP):
        raise ValueError(
            f"--context {args.context}: {args.model} has {llama.max_position_embeddings} positions (max_position_embeddings)"
        )
    shown = np.arange(min(3, len(corpus)))
    if args.row:
        if missing := sorted(set(args.row) - set(corpus.rows.tolist())):
            raise ValueError(
                f"{args.data}: row {missing[0]} is not among the {len(corpus):,} samples (rows count from 1)"
            )
        shown = np.unique([i for row in args.row for i in np.flatnonzero(corpus.rows == row)[:3]])
    samples = np.union1d(shown, np.arange(min(args.stats, len(corpus))))
    looked, chosen = views(args, corpus, samples, tokenizer), corpus.take(samples)
    shown = np.searchsorted(samples, shown).tolist()
    if args.html:
        Path(args.html).write_text(
            page(chosen, shown, looked, tokenizer, f"{Path(args.data).name}, η {args.eta:g}"), encoding="utf-8"
        )
        print(f"wrote {args.html}")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for sample in shown:
        supervised = chosen.loss_mask & (chosen.doc_ids == sample)
        prompt, answer = pieces(chosen, sample)
        print(f"══ {name_of(chosen, sample)} ══\n{printable(prompt)}\n")
        for view in looked:
            picked = f"{view.important[supervised].sum():,} of {supervised.sum():,} tokens important"
            print(f"── {view.name}: {picked} ──\n{marked(chosen, answer, view, colour)}\n")
    print("\n".join(summary(chosen, looked, tokenizer)))


def main() -> None:
    try:
        look(parse_args())
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
