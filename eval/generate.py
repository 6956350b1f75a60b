"""Greedy continuations of prompts, to the harness's rules: in batches of like length, each ended by its stop strings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import Tokenizer
from eval.score import Encoder
from files import read_json
from model import Llama


@dataclass(frozen=True)
class Prompt:
    """One item that is answered in words."""

    task: str
    doc_id: int
    text: str
    max_new_tokens: int
    stops: tuple[str, ...]
    judge: Callable[[str], dict]  # the response -> its metrics


def respond(
    model: Llama,
    encoder: Encoder,
    prompts: list[tuple[str, int, tuple[str, ...]]],
    stop_ids: tuple[int, ...],
    world=None,
    cached_tokens: int | None = None,
    name: str = "writing",
) -> list[str]:
    """What the model writes after each prompt.

    Args:
        prompts: (text, most new tokens, stop strings). A prompt is cut from the left so that they fit the model's window; where they
            take more than half of it, they are cut to half.
        stop_ids: tokens that end a sequence.
        world: ranks that share the batches; rank 0 gets all texts, the others None for what is not theirs.
        cached_tokens: positions of one batch's key/value cache; None: 32,768 on a CPU, 262,144 on a GPU.

    Returns:
        the decoded new tokens of each, without special tokens, up to the first of its stop strings or of the end token's text.
    """
    device, window = model.lm_head.weight.device, model.cfg.max_position_embeddings
    cached_tokens = cached_tokens or (32_768 if device.type == "cpu" else 262_144)
    tokenizer = encoder.tokenizer
    new = [min(most, window // 2) for _, most, _ in prompts]
    ids = [ids[-(window - n) :] or [tokenizer.bos] for ids, n in zip(encoder([text for text, *_ in prompts]), new)]
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][1:], len(ids[i])), reverse=True)
    batches = [[]]
    for i in order:
        batch = batches[-1]
        if batch and (prompts[batch[0]][1:] != prompts[i][1:] or (len(batch) + 1) * (len(ids[batch[0]]) + new[batch[0]]) > cached_tokens):
            batches.append(batch := [])
        batch.append(i)
    mine = batches if world is None else batches[world.rank :: world.size]
    texts: list[str | None] = [None] * len(prompts)
    with tqdm(total=sum(map(len, mine)), desc=name, unit="text", disable=None, leave=False) as bar:
        for batch in filter(None, mine):
            stops = prompts[batch[0]][2]
            ended = (lambda tokens, stops=stops: stopped(tokens, stops, tokenizer.decode)) if stops else None
            found = model.generate([ids[i] for i in batch], new[batch[0]], stop_ids=stop_ids, ended=ended)
            for i, tokens in zip(batch, found):
                texts[i] = trimmed(tokenizer.decode(tokens), (*stops, tokenizer.end_token))
            bar.update(len(batch))
    for part in [] if world is None else world.gather(name, texts):
        texts = [mine if mine is not None else theirs for mine, theirs in zip(texts, part)]
    return texts


def trimmed(text: str, stops: tuple[str, ...]) -> str:
    """What stands before each stop string's first occurrence."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def stopped(tokens: list[int], stops: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    """Whether the newest tokens complete a stop string."""
    longest = max(map(len, stops))
    recent = decode(tokens[-longest - 4 :])  # a character or more each, but for a few bytes of one
    return any(stop in recent for stop in stops) and any(stop in decode(tokens) for stop in stops)


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: those of the folder's generation_config.json, else the tokenizer's.

    Raises:
        ValueError: the file asks for what changes greedy decoding, which the harness would heed.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name, neutral in (("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0), ("num_beams", 1)):
        if settings.get(name) not in (None, neutral):
            raise ValueError(f"{path}: {name} is {settings[name]}, and generation here is plain greedy; take it out to score without it")
    named = settings.get("eos_token_id")
    return tuple(named) if isinstance(named, list) else (tokenizer.end if named is None else named,)


def write(model: Llama, encoder: Encoder, prompts: list[Prompt], stop_ids: tuple[int, ...], world=None) -> list[dict]:
    """What each item gives: the response and its metrics (rank 0; the others judge nothing)."""
    texts = respond(
        model, encoder, [(p.text, p.max_new_tokens, p.stops) for p in prompts], stop_ids, world, name=f"writing {prompts[0].task}"
    )
    if world is not None and world.rank:
        return []
    return [{"response": text, "metrics": prompt.judge(text)} for prompt, text in zip(prompts, texts)]
