from pathlib import Path
from published.files import read_json, write_json
ROOT = Path(__file__).parents[1]
LLAMA3 = dict(vocab_size=128_256, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072)
SHAPES = {  # Llama-3.2-3B, Llama-3.1-8B, and one to try programs with: what each changes of demo/base's config.json
    "3b": LLAMA3 | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
    "8b": LLAMA3 | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "tiny": dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8),
}
SHAPES["8b"]["tie_word_embeddings"] = False


def folder_of(folder: Path, shape: str, **changes) -> Path:
    """Write a config.json of this shape there."""
    write_json(folder / "config.json", read_json(ROOT / "demo" / "base" / "config.json") | SHAPES[shape] | changes)
    return folder
