"""Where demo/base came from: its tokenizer, its configuration and the split of the books it was pretrained on.

    python demo/make_base.py BOOKS.jsonl.gz WORK

writes WORK/init (config.json, tokenizer.json, tokenizer_config.json; no weights: train.py --fresh), WORK/train.jsonl and
WORK/heldout.jsonl (every twentieth book). The pretraining command and its curve are in LOG.md.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import read_rows
from published.files import write_json

VOCAB = 4096
SPECIAL = [f"<|{name}|>" for name in (
    "begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag", "finetune_right_pad_id",
)]  # fmt: skip
# Llama 3 splits text into words, numbers of up to three digits, punctuation and white space before it merges bytes.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    initializer_range=0.02,
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over `texts`, with Llama 3's word splitting and special tokens (last ids, as there)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIAL), initial_alphabet=alphabet))
    tokenizer.add_special_tokens(SPECIAL)
    bos = SPECIAL[0]
    with_bos = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), with_bos])
    return tokenizer


def main(books: str, work: str) -> None:
    texts = [row["text"] for _, row in read_rows(books)]
    heldout = texts[19::20]
    training = [text for i, text in enumerate(texts) if i % 20 != 19]
    init = Path(work) / "init"
    init.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(training)
    tokenizer.save(str(init / "tokenizer.json"))
    bos, end = (tokenizer.token_to_id(token) for token in SPECIAL[:2])
    write_json(init / "config.json", {**CONFIG, "bos_token_id": bos, "eos_token_id": end})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "model_max_length": 8192}
    write_json(init / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    for name, part in (("train", training), ("heldout", heldout)):
        with open(Path(work) / f"{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        print(f"{name}: {len(part)} books, {sum(map(len, part)):,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
