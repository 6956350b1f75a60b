"""Fetching the benchmarks from a Hub that this test plays, and reading them as the Hub has them."""

import json
import os
import subprocess
import sys
import threading
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import pytest
from benchmarks import DATA, hub_rows, needs_data
from stories260k import SHARED

from eval import download
from eval.benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[1]
pq = pytest.importorskip("pyarrow.parquet", reason='the Hub has parquet files: pip install -e ".[parquet]"')
import pyarrow as pa  # noqa: E402

FILES = {  # the Hub's repositories and file names, and which of hub_rows lies in each
    "cais/mmlu": {"all/test-00000-of-00001.parquet": "mmlu", "all/dev-00000-of-00001.parquet": "mmlu_dev"},
    "regisss/math_qa": {"data/test-00000-of-00001.parquet": "mathqa"},
    "allenai/ai2_arc": {"ARC-Challenge/test-00000-of-00001.parquet": "arc_challenge"},
    "allenai/openbookqa": {"main/test-00000-of-00001.parquet": "openbookqa"},
    "Rowan/hellaswag": {"data/validation-00000-of-00001.parquet": "hellaswag"},
    "truthfulqa/truthful_qa": {
        "multiple_choice/validation-00000-of-00001.parquet": "truthfulqa_mc",
        "generation/validation-00000-of-00001.parquet": "truthfulqa_gen",
    },
    "google/IFEval": {"ifeval_input_data.jsonl": "ifeval"},
}
SHA = "0123456789abcdef0123456789abcdef01234567"


def content(file: str, rows: list[dict]) -> bytes:
    if file.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks for: what a repository holds, and its files."""

    files: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []

    def respond(self, body: bytes, kind: str = "application/json", status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        for name, files in self.files.items():
            if path.startswith(f"/api/datasets/{name}/tree/"):
                listing = [
                    {"type": "file", "path": file, "size": len(data), "oid": SHA} for file, data in files.items()
                ]
                return self.respond(json.dumps(listing).encode())
            if path.startswith(f"/api/datasets/{name}"):
                about = {
                    "id": name,
                    "sha": SHA,
                    "siblings": [{"rfilename": file} for file in [*files, "README.md", "train-0.parquet"]],
                }
                return self.respond(json.dumps(about).encode())
            for file, data in files.items():
                if path == f"/datasets/{name}/resolve/{SHA}/{file}":
                    return self.respond(
                        data, "application/octet-stream", ETag=f'"{zlib.crc32(data):x}"', X_Repo_Commit=SHA
                    )
        return self.respond(b'{"error": "Repository not found"}', status=404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    """The address of a Hub with every benchmark's real rows."""
    rows = hub_rows()
    Hub.files = {name: {file: content(file, rows[key]) for file, key in files.items()} for name, files in FILES.items()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def fetch(monkeypatch, capsys):
    """fetch(endpoint, cwd, *flags): what `python -m eval.download *flags` does there, called in this process."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("logging.raiseExceptions", False)  # the client may log to an earlier test's stderr
    client = huggingface_hub.snapshot_download

    def called(endpoint: str, cwd: Path, *flags: str) -> SimpleNamespace:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", partial(client, endpoint=endpoint))
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        said = ""
        try:
            download.main([*flags])
        except SystemExit as e:
            said = e.code
        printed, errors = capsys.readouterr()
        return SimpleNamespace(returncode=int(bool(said)), stdout=printed, stderr=f"{errors}{said}")

    return called


def command(endpoint: str, cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "hf"), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "eval.download"], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )


@needs_data
def test_every_benchmark_is_fetched_counted_and_read_like_the_released_files(hub, tmp_path, fetch):
    done = command(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mmlu           14,042 rows fetched: benchmarks/mmlu/all/test-00000-of-00001.parquet" in done.stdout
    assert len(done.stdout.split("\n")) == 10
    assert not any("train" in path or "README" in path for path in Hub.asked), "only the test sets are fetched"
    for name in ("mmlu", "mmlu_5shot", "mathqa", "arc_challenge", "openbookqa", "truthfulqa_mc", "hellaswag"):
        assert BENCHMARKS[name].load(tmp_path / "benchmarks") == BENCHMARKS[name].load(DATA), name
    asked = len(Hub.asked)
    again = fetch(hub, tmp_path)  # and from here on within this process
    assert again.returncode == 0 and again.stdout == done.stdout.replace("fetched", "already here")
    assert len(Hub.asked) == asked, "what is here is not fetched again"


@needs_data
def test_prompts_that_are_answered_in_words_are_read_alike_too(hub, tmp_path, fetch):
    pytest.importorskip(
        "lm_eval", reason="IFEval's checks are the lm-evaluation-harness's: pip install -e \".[harness]\""
    )
    assert fetch(hub, tmp_path, "--tasks", "truthfulqa_gen,ifeval", "--to", "d").returncode == 0
    os.environ.setdefault("NLTK_DATA", str(SHARED / "nltk_data"))
    for name in ("truthfulqa_gen", "ifeval"):
        both = [BENCHMARKS[name].load(folder) for folder in (tmp_path / "d", DATA)]
        for one, two in zip(*both, strict=True):
            assert (one.task, one.doc_id, one.text, one.judge.args) == (two.task, two.doc_id, two.text, two.judge.args)


@needs_data
def test_a_copy_cut_short_is_refused_and_the_others_are_fetched(hub, tmp_path, fetch):
    whole = Hub.files["allenai/openbookqa"]
    try:
        Hub.files["allenai/openbookqa"] = {file: content(file, hub_rows()["openbookqa"][:400]) for file in whole}
        done = fetch(hub, tmp_path, "--tasks", "openbookqa,arc_challenge")
    finally:
        Hub.files["allenai/openbookqa"] = whole
    assert (
        done.returncode == 1 and "400 rows, but the benchmark has 500" in done.stderr and "Traceback" not in done.stderr
    )
    assert "arc_challenge   1,172 rows fetched" in done.stdout


def test_without_network_one_message_says_what_to_fetch_and_where_to_put_it(tmp_path, fetch):
    done = fetch("http://127.0.0.1:9", tmp_path, "--tasks", "hellaswag", "--to", "d")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        'hf download Rowan/hellaswag --repo-type dataset --include "data/validation-*.parquet" --local-dir d/hellaswag'
        in done.stderr
    )
    assert done.stderr.strip().split("\n")[2:] == ["or put the released hellaswag_val.jsonl (or .gz) into d/hellaswag"]


def test_without_network_a_folder_that_has_other_files_says_the_same(tmp_path, fetch):
    (tmp_path / "d" / "truthfulqa").mkdir(parents=True)
    (tmp_path / "d" / "truthfulqa" / "TruthfulQA.csv").write_text("Question\n")
    done = fetch("http://127.0.0.1:9", tmp_path, "--tasks", "truthfulqa_mc", "--to", "d")
    assert done.returncode == 1 and "the Hub did not give it" in done.stderr and "no file like" not in done.stderr


def test_parquet_without_pyarrow_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    from eval import hellaswag

    monkeypatch.setattr(download, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", partial(pytest.fail, "asked the Hub"))
    with pytest.raises(ValueError, match=r'pip install -e "\.\[parquet\]"'):
        download.fetch(hellaswag.VALIDATION, tmp_path)


@needs_data
@pytest.mark.parametrize("damage", ["cut", "foreign", "short"])
def test_the_hub_s_own_copy_is_fetched_again_where_it_is_damaged(hub, tmp_path, damage, fetch):
    flags = ("--tasks", "openbookqa", "--to", "d")
    assert fetch(hub, tmp_path, *flags).returncode == 0
    (path,) = (tmp_path / "d" / "openbookqa" / "main").iterdir()
    whole = path.read_bytes()
    rows = hub_rows()["openbookqa"][:9]
    times = path.stat().st_atime, path.stat().st_mtime
    path.write_bytes({"cut": whole[:999], "foreign": b"<html>", "short": content("x.parquet", rows)}[damage])
    os.utime(path, times)  # as a bad disk does it: the client would trust the file
    again = fetch(hub, tmp_path, *flags)
    assert again.returncode == 0 and "500 rows fetched again" in again.stdout, again.stderr
    assert path.read_bytes() == whole
    path.write_bytes(whole[:999])
    told = fetch("http://127.0.0.1:9", tmp_path, *flags)
    assert told.returncode == 1 and "ove it away" in told.stderr and "Traceback" not in told.stderr


@needs_data
@pytest.mark.parametrize(
    "name, damaged",
    [
        ("main/test-00000-of-00001.parquet", b"PAR1"),
        ("test.jsonl", b'{"a": 1}\n'),
        ("test.jsonl", b'{"a'),
        ("test.jsonl.gz", b"\x1f\x8b cut"),
    ],
)
def test_a_file_of_somebody_else_is_never_written_over(hub, tmp_path, name, damaged, fetch):
    path = tmp_path / "d" / "openbookqa" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    told = fetch(hub, tmp_path, "--tasks", "openbookqa", "--to", "d")
    assert told.returncode == 1 and "ove it away" in told.stderr and path.read_bytes() == damaged


def test_mmlu_by_hand_is_its_csv_files(tmp_path, fetch):
    told = fetch("http://127.0.0.1:9", tmp_path, "--tasks", "mmlu_5shot", "--to", "d").stderr
    assert "or put the released *_test.csv into d/mmlu" in told and "released test.jsonl" not in told
