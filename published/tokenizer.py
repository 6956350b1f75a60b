"""A model folder's tokenizer, in and out: tokenizer.json, chat template, end tokens of generation_config.json."""

from pathlib import Path

import tokenizers
import torch

from published.files import read_json, read_tensor, write_json
from published.weights import EMBEDDING, weight_files

CHAT_TEMPLATES = {  # data.py's templates in Jinja, saved with the model; transformers' apply_chat_template reads it
    "plain": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "Assistant: {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{{ messages[0]['content'] }}\n\n### Response:"
        "{% for m in messages[1:] %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}


class Tokenizer:
    """A model folder's tokenizer.json, with the ids that begin and end a document.

    Raises:
        ValueError: no readable tokenizer.json, no begin or end token, or more tokens than the model has embeddings.
    """

    def __init__(self, folder: str | Path, vocab_size: int):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no tokenizer.json here; copy the one the model was trained with")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers file ({e})") from e
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "<|end_of_text|>" in a row is text, not an end
        self.config = read_json(config) if (config := self.folder / "tokenizer_config.json").is_file() else {}
        size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        if size > vocab_size:
            known = f"the model embeds {vocab_size} tokens; do they belong together?"
            raise ValueError(f"{path}: ids up to {size - 1}, but {known}")
        self.bos_token = self._name("bos_token", "<|begin_of_text|>")
        self.end_token = self._name("eos_token", "<|end_of_text|>")
        self.bos, self.end = self.id(self.bos_token), self.id(self.end_token)
        self.raw = path.read_bytes()  # kept, because the folder may be gone when the model is saved

    def _name(self, role: str, llama3: str) -> str:
        """Llama 3's own token where there is one, else what tokenizer_config.json calls it."""
        named = self.config.get(role)
        named = named.get("content") if isinstance(named, dict) else named
        for token in (llama3, named):
            if isinstance(token, str) and self.backend.token_to_id(token) is not None:
                return token
        tried = f"neither {llama3} nor tokenizer_config.json's {role} ({named}) is in tokenizer.json"
        raise ValueError(f"{self.folder}: no {role}: {tried}")

    def id(self, token: str) -> int:
        if token == "<|end_of_text|>" and self.backend.token_to_id(token) is None:
            token = self.end_token
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.folder}: the tokenizer has no {token}; use another --template")
        return found

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def stop_ids(self, template: str) -> list[int]:
        """Every token that ends an answer under `template`."""
        return sorted({self.end, self.id("<|eot_id|>")} if template == "llama3" else {self.end})

    def ids(self, template: str) -> dict:
        """The ids for a model's config.json, as trained; a padding id only where there is one that ends nothing."""
        pad, ends = self.config.get("pad_token"), self.stop_ids(template)
        pad = pad.get("content") if isinstance(pad, dict) else pad
        pad = self.backend.token_to_id(pad) if isinstance(pad, str) else None
        eos = ends if len(ends) > 1 else ends[0]
        return {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": None if pad in ends else pad}

    def save(self, folder: str | Path, template: str) -> None:
        """tokenizer.json unchanged, tokenizer_config.json with the chat template, generation_config.json."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_bytes(self.raw)
        config = {"clean_up_tokenization_spaces": False, **self.config, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"bos_token": self.bos_token, "eos_token": "<|eot_id|>" if template == "llama3" else self.end_token}
        config.pop("chat_template", None)
        if template in CHAT_TEMPLATES:
            config["chat_template"] = CHAT_TEMPLATES[template]
        write_json(folder / "tokenizer_config.json", config)
        generation = {name: ids for name, ids in self.ids(template).items() if ids is not None}
        generation["eos_token_id"] = self.stop_ids(template)
        write_json(folder / "generation_config.json", generation)


def require_trained_headers(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse the llama3 template on a base model: its rows for the headers are far below the median, or alike."""
    files = weight_files(folder)
    if not files:
        return  # fresh weights: every row is untrained alike
    if EMBEDDING not in files:
        raise ValueError(f"{folder}: no {EMBEDDING} among the tensors; is this the published (Hub) layout?")
    rows = read_tensor(files[EMBEDDING], EMBEDDING).float()  # (V, D)
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    found = rows[[tokenizer.id(token) for token in headers]]  # (3, D)
    norms, median = found.norm(dim=1), float(rows.norm(dim=1).median())
    alike = float(torch.nn.functional.cosine_similarity(found, found.roll(1, 0)).min())
    # With a tied head, the rows of unused tokens all drift in the same direction, so their cosines approach 1.
    if norms.min() < median / 2 or alike > 0.95:
        measured = f"norms from {norms.min():.3g} (median row {median:.3g}) and cosines above {alike:.2f} to each other"
        raise ValueError(
            f"{folder}: this base model never trained {', '.join(headers)}: their embeddings have {measured}, and at "
            "fine-tuning's learning rates they never will be trained; use --template plain, or an instruction-tuned "
            "checkpoint"
        )
