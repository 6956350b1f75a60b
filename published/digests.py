"""What a data file or a model holds, in a few characters: the same content is the same run, wherever it lies."""

import hashlib
from pathlib import Path

from published.weights import weight_files

MEGABYTE, SPREAD = 2**20, 64
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def of_model(name: str, folder: Path) -> str:
    """Of a Hub name its commit; of a folder SHA-256 of its small files and of parts of its weights.

    Of each safetensors file: size, header and 64 megabytes at equal distances; of 16 GB that takes under two seconds.
    """
    if not Path(name).is_dir():
        return f"commit {folder.name}"
    sha = hashlib.sha256()
    for path in (folder / small for small in SMALL if (folder / small).is_file()):
        sha.update(f"{path.name} {of_file(path)} ".encode())
    for path in sorted({*weight_files(folder).values()}):
        size = path.stat().st_size
        with open(path, "rb") as f:
            header = 8 + int.from_bytes(f.read(8), "little")
            f.seek(0)
            sha.update(f"{path.name} {size} ".encode() + f.read(header))
            step = max((size - header - MEGABYTE) / (SPREAD - 1), MEGABYTE)
            for i in range(SPREAD):
                f.seek(header + int(i * step))
                sha.update(f.read(MEGABYTE))
    return sha.hexdigest()
