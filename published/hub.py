"""Names to local files: a path is itself, anything else is asked of the Hub."""

from pathlib import Path

from published.files import read_json
from published.weights import unfinished, weight_files


def resolve(name: str | Path) -> Path:
    """The local folder of a model: a path, or a Hub name, downloaded (config, tokenizer and safetensors only)."""
    if (folder := Path(name)).is_dir():
        return model_folder(folder)
    if Path(name).is_file():
        raise ValueError(f"{name}: a file, expected a model folder (or a Hub name)")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder (a Hub name has the form organisation/model)")
    folder = download(str(name), ["*.json", "*.safetensors"], '--exclude "original/*"')
    if not weight_files(folder):
        fix = f"convert its weights, or choose another repository{unfinished(folder)}"
        raise ValueError(f"{name}: the Hub has no safetensors of it; {fix}")
    return folder


def model_folder(folder: Path) -> Path:
    """The folder itself; ValueError, with the model's folder, where it is one around a model: a run, a Hub cache."""
    config = folder / "config.json"
    if config.is_file() and not {"config", "versions"} <= read_json(config).keys():  # as a run's has
        return folder
    around = folder.resolve().parents
    models = [*folder.glob("model/config.json"), *folder.glob("snapshots/*/config.json")]
    models += [path / "model/config.json" for path in around[1:2] if around[0].name == "checkpoints"]
    if models := [str(path.parent) for path in models if path.is_file()]:
        raise ValueError(f"{folder}: not a model's folder; the model is {' or '.join(models)}")
    if config.is_file() or around[0].name == "checkpoints":
        raise ValueError(f"{folder}: the folder of a run without a model: it has not ended; its command resumes it")
    return folder


def data_file(name: str) -> Path:
    """The local file behind `--data`: a path, or hf://datasets/ORGANISATION/NAME/FILE, downloaded from the Hub."""
    if not name.startswith("hf://"):
        return Path(name)
    kind, organisation, repository, *path = f"{name[5:]}///".split("/", 3)
    file = "".join(path).rstrip("/")
    if kind != "datasets" or not file:
        raise ValueError(f"{name}: a file on the Hub has the form hf://datasets/ORGANISATION/NAME/FILE")
    return download(f"{organisation}/{repository}", [file], f"{file} --repo-type dataset", "dataset") / file


def download(repository: str, patterns: list[str], flags: str, repo_type: str = "model") -> Path:
    """The local copy of a repository's files that match `patterns`; `flags`: what `hf download` needs besides its name.

    Several processes may call it at once: the Hub's client locks the files it writes.
    """
    from huggingface_hub import snapshot_download  # comes with tokenizers

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, repo_type=repo_type))
    except Exception as e:  # the Hub's client raises many kinds: no network, gated, not found
        raise refused(repository, flags, e) from e


def refused(repository: str, flags: str, e: Exception) -> ValueError:
    """What to do by hand where the Hub gave nothing."""
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    gated = "\nIt is gated: accept its terms on its page of the Hub with your account, then `hf auth login`"
    if not repository.startswith(("meta-llama/", "GAIR/lima")) and type(e).__name__ != "GatedRepoError":
        gated = ""
    return ValueError(
        f"{repository}: not here, and the Hub did not give it ({reason}). Where there is network:\n"
        f"  hf download {repository} {flags}{gated}"
    )
