"""Model folders and their files: found here or on the Hub, safetensors and JSON read and written. Off the reading path."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def resolve(name: str | Path) -> Path:
    """The local folder of a model: a path as it is, or a Hub name, downloaded (config, tokenizer and safetensors only)."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(f"{name}: a file, expected a model folder (or a Hub name)")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder (a Hub name has the form organisation/model)")
    folder = download(str(name), ["*.json", "*.safetensors"], '--exclude "original/*"')
    if not weight_files(folder):
        raise ValueError(f"{name}: the Hub has no safetensors of it; convert its weights, or choose a repository that has them")
    return folder


def download(repository: str, patterns: list[str], flags: str, repo_type: str = "model") -> Path:
    """The local copy of a Hub repository's files that match `patterns`; `flags` is what `hf download` needs besides the name."""
    from huggingface_hub import snapshot_download  # comes with tokenizers

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, repo_type=repo_type))
    except Exception as e:  # the Hub's client raises many kinds: no network, gated, not found
        raise not_given(repository, flags, e) from e


def not_given(repository: str, flags: str, e: Exception) -> ValueError:
    """What to do by hand where the Hub gave nothing."""
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    gated = "\nIt is gated: accept its terms on its page of the Hub with your account, then `hf auth login`"
    if not repository.startswith(("meta-llama/", "GAIR/lima")) and type(e).__name__ != "GatedRepoError":
        gated = ""
    return ValueError(
        f"{repository}: not here, and the Hub did not give it ({reason}). Where there is network:\n"
        f"  hf download {repository} {flags}{gated}"
    )


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a model folder; empty when it has no weights at all."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise ValueError(f"{index}: no weight_map from tensors to files; download the index again")
        if lost := sorted({n for n in names.values() if Path(n).name != n or not (folder / n).is_file()}):
            raise ValueError(f"{index}: names {', '.join(lost[:3])}, not in this folder; is the download complete?")
        return {tensor: folder / name for tensor, name in names.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with open_safetensors(single) as f:
            if not f.keys():
                raise ValueError(f"{single}: holds no tensor; remove it to start from fresh weights")
            return dict.fromkeys(f.keys(), single)
    if shards := sorted(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: {shards[0].name} but neither model.safetensors nor its index; is the download complete?")
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        raise ValueError(f"{folder}: weights only as {pickles[0]}, a pickle, which can run code when opened; convert them to safetensors")
    return {}


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e}); is the download complete?") from e


def read_tensor(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    """A tensor of the file, or some of its rows; the rest is not read."""
    with open_safetensors(path) as f:
        try:
            return f.get_tensor(name) if rows == slice(None) else f.get_slice(name)[rows]
        except SafetensorError as e:
            raise ValueError(f"{path}: cannot read {name} ({e})") from e


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    with open_safetensors(path) as f:
        return tuple(f.get_slice(name).get_shape())


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.touch()
        mode = path.stat().st_mode  # what the umask allows; the library would leave 0600, unreadable for a colleague
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written ({e}); is the disk full?") from e


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value) -> None:
    """An object as a JSON file, there whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
