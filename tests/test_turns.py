"""published/turns.py, rows.py, digests.py: what a row says is what is trained on; a file is known by what it holds."""

import gzip
import json
import os
import shutil

import pytest
from tiny import VOCAB, tiny_folder

from data import END, RESPONSE, load_corpus
from model import Llama
from published import digests
from published.rows import read_rows
from published.tokenizer import Tokenizer
from published.turns import SWITCHES, WHY, parse

U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
ONE = [("user", "Hi", False), ("assistant", "Yes", True)]
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]


def turns(row) -> list[tuple]:
    """Each turn; whether a turn that is no answer is trained on means nothing."""
    return [(role, text, train and role == "assistant") for role, text, train in parse("here", row)[1]]


READ = {
    "weight 0": ({"messages": [U("Hi"), A("No") | {"weight": 0}, U("Hi"), A("Yes") | {"weight": 1}]}, "No", ONE),
    "train false": ({"messages": [U("Hi"), A("No") | {"train": False}, U("Hi"), A("Yes")]}, "No", ONE),
    "loss 0.0": ({"conversations": [U("Hi"), A("No") | {"loss": 0.0}, U("Hi") | {"loss": 0}, A("Yes")]}, "No", ONE),
    "messages before the answer": ({"prompt": [U("Hi"), A("No"), U("Hi")], "completion": [A("Yes")]}, "No", ONE),
    "history after a system turn": (
        {"messages": [S("Be brief"), U("Hi"), A("Yes")], "history": [["Hi", "Yes"]]},
        None,
        [("system", "Be brief", False), *ONE, *ONE],
    ),
    "history": ({"instruction": "Hi", "output": "Yes", "history": [["Hi", "Yes"]]}, None, ONE + ONE),
}


@pytest.mark.parametrize("name", READ)
def test_answers_that_are_context_and_earlier_turns_are_read(name):
    row, context, expected = READ[name]
    before = [("user", "Hi", False), ("assistant", context, False)] if context else []
    assert turns(row) == before + expected


SYSTEM = [("system", "Be brief", False), *ONE]
WITH_SYSTEM = {
    "beside messages": {"system": "Be brief", "messages": [U("Hi"), A("Yes")]},
    "beside ShareGPT": {"system": "Be brief", "conversations": [{"from": "human", "value": "Hi"}, A("Yes")]},
    "beside LIMA's": {"system_prompt": "Be brief", "conversations": ["Hi", "Yes"]},
    "in Alpaca": {"system": "Be brief", "instruction": "Hi", "input": None, "output": "Yes", "history": []},
    "beside a prompt": {"system": "Be brief", "prompt": "Hi", "completion": "Yes"},
    "twice the same": {"system": "Be brief", "messages": [S("Be brief"), U("Hi"), A("Yes")]},
    "a developer's": {"messages": [{"role": "developer", "content": "Be brief"}, U("Hi"), A("Yes")]},
    "in parts": {"messages": [S([{"type": "text", "text": "Be brief"}]), U(PARTS), A("Yes")]},
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_turn_is_read_wherever_it_stands(name):
    assert turns(WITH_SYSTEM[name]) == SYSTEM


def test_null_is_not_there_and_refused_fields_that_say_nothing_are_nothing():
    fields = dict.fromkeys(WHY) | {"text": None, "system": None, "x": None}
    row = {"messages": [U("Hi") | fields, A("Yes") | fields | {"weight": None}], "prompt": None} | fields
    assert turns(row) == ONE and parse("", row)[2] == set()
    empty = {"tools": [], "images": [], "reasoning_content": "", "function_call": {}, "tool_calls": "[]"}
    assert turns({"prompt": "Hi", "completion": "Yes"} | empty) == ONE


def test_fields_that_change_nothing_are_named():
    row = {"messages": [U("Hi") | {"id": 3}, A("Yes") | {"name": "x"}], "source": "y", "prompt": "Hi", "label": "maths"}
    assert parse("", row)[2] == {"id", "name", "source", "prompt", "label"}


REFUSED_ROWS = {
    "a weight between": ({"messages": [U("Hi"), A("Yes") | {"weight": 0.5}]}, r"messages\[1\]\.weight is 0.5"),
    "a weight of the row": ({"prompt": "Hi", "completion": "Yes", "weight": 2}, "here: weight is 2, expected 1"),
    "a user's turn to train": ({"messages": [U("Hi") | {"train": True}, A("Yes")]}, r"messages\[0\]\.train is True"),
    "reasoning": ({"messages": [U("Hi"), A("Yes") | {"thinking": "Hm"}]}, r"messages\[1\]\.thinking: no template"),
    "tools": ({"messages": [U("Hi"), A("Yes")], "tools": [{"name": "f"}]}, "here: tools: no template"),
    "a tool's turn": ({"messages": [U("Hi"), {"role": "tool", "content": "3"}]}, r"messages\[1\] is .*tool"),
    "a tool call": (
        {"messages": [U("Hi"), {"role": "assistant", "content": None, "tool_calls": [1]}]},
        r"messages\[1\]\.tool_calls: no template",
    ),
    "a picture": (
        {"messages": [U([{"type": "image_url", "image_url": "x"}]), A("Yes")]},
        r"\[0\] is of type 'image_url'",
    ),
    "pictures beside": ({"conversations": ["Hi", "Yes"], "image": "a.png"}, "here: image: only text is read"),
    "preferences": ({"prompt": "Hi", "completion": "Yes", "rejected": "No"}, "here: rejected: pairs of answers"),
    "two lists": ({"messages": [U("a"), A("b")], "conversations": ["c", "d"]}, "messages and conversations say diff"),
    "two contents": ({"messages": [U("a") | {"value": "b"}, A("b")]}, "content and value say different things"),
    "two systems": ({"system": "a", "messages": [S("b"), U("c"), A("d")]}, "system and the first turn say different"),
    "history of another form": ({"instruction": "a", "output": "b", "history": ["c"]}, "history is .*expected a list"),
    "text with a system": ({"text": "a", "system": "b"}, "text with system or history"),
    "a mask of 0": ({"messages": [U("Hi"), A("Yes") | {"mask": 0}]}, r"messages\[1\]\.mask: an answer is trained on"),
    "a list of weights": ({"messages": [U("Hi"), A("Yes") | {"loss_mask": [0, 1]}]}, r"\.loss_mask is \[0, 1\]"),
    "a part not to train": (
        {"messages": [U("Hi"), A([{"type": "text", "text": "Yes", "train": False}])]},
        "a part that is not trained on",
    ),
    "a context": ({"instruction": "Hi", "output": "Yes", "context": "x"}, "here: context: only Alpaca has a place"),
    "an input beside a prompt": ({"prompt": "Hi", "completion": "Yes", "input": "x"}, "here: input: only Alpaca"),
    "preferences alone": ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "here: chosen: pairs of answers"),
    "split by name": ({"train": [{"prompt": "a"}]}, r"Are the rows in 'train'\?"),
    "columns": ({"prompt": {"0": "a"}, "completion": {"0": "b"}}, "here: prompt is dict, expected a string"),
    "bytes of Parquet": ({"messages": b"x"}, "messages is .*expected a list"),
    "rows inside": ({"data": [{"prompt": "a"}]}, r"fields 'data'.*Are the rows in 'data'\? Take them out: jq '\.data'"),
    "half a pair in a part": ({"messages": [U([{"text": "\ud83d"}]), A("b")]}, r"content\[0\] holds \\ud83d"),
}


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_what_cannot_be_honoured_is_refused_with_its_name(name):
    row, message = REFUSED_ROWS[name]
    with pytest.raises(ValueError, match=message) as e:
        parse("here", row)
    assert "\n" not in str(e.value) and str(e.value).startswith("here: ")


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_row_that_is_switched_off_is_dropped_and_counted(tmp_path, switch):
    tokenizer, path = Tokenizer(tiny_folder(tmp_path / "m"), VOCAB), tmp_path / "rows.jsonl"
    rows = [{"prompt": "Hi", "completion": "Yes", switch: on} for on in (1, 0, True, False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(path, tokenizer, "auto", 512)
    assert corpus.counts == {"rows": 4, "kept": 2, "dropped: no response is trained on": 2}
    assert corpus.ignored == set()


def test_an_answer_of_weight_0_is_context_as_generation_reads_it(tmp_path):
    tokenizer, path = Tokenizer(tiny_folder(tmp_path / "m"), VOCAB), tmp_path / "rows.jsonl"
    talk = [U("Hi"), A("No"), U("Sure?"), A("Yes"), U("Why?"), A("So")]
    off = [m | {"weight": int(m["content"] == "Yes")} if m["role"] == "assistant" else m for m in talk]
    path.write_text("\n".join(json.dumps({"messages": m, "id": 1}) for m in (talk[:4], off)))
    both, one = (load_corpus(path, tokenizer, "auto", 512).take([i]) for i in range(2))
    assert both.ids.tolist() == one.ids.tolist() and one.loss_mask.sum() < both.loss_mask.sum()
    read = "".join(one.text[a:b] for a, b in one.spans[one.loss_mask])
    assert (one.kind == END).sum() == 1 and one.loss_mask.sum() == (one.kind == RESPONSE).sum() + 1
    assert read == " Yes", "the last turns, which teach nothing, are left out"
    counts = load_corpus(path, tokenizer, "auto", 512)
    assert counts.counts["last turns without an answer to train on left out"] == 1 and counts.ignored == {"id"}


# Files.

OTHER_KINDS = {
    "rows.zip": (b"PK\x03\x04....", "a zip archive.*unzip"),
    "rows.zst": (b"\x28\xb5\x2f\xfd....", "Zstandard.*zstd -d"),
    "rows.xz": (b"\xfd7zXZ\x00", "xz -d"),
    "rows.bz2": (b"BZh91AY", "bzip2 -d"),
    "rows.tar": (b"a" + b"\0" * 256 + b"ustar\x0000", "tar archive"),
    "rows.arrow": (b"\xff\xff\xff\xff\x10\x00", "Arrow.*to_json"),
    "rows.pkl": (b"\x80\x04\x95\x10", "pickle"),
    "rows.XLSX.xlsx": (b"PK\x03\x04....", "a spreadsheet"),
    "old.pkl": (b"\x80\x02}q", "pickle"),
    "rows.npy": (b"\x93NUMPY", "numpy"),
    "twice.gz": (gzip.compress(gzip.compress(b"x")), "gzipped twice"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "gzipped Parquet"),
    "rows.txt": (b"prompt,completion\nHi,Yes\n", "CSV"),
    "tabs.tsv.gz": (gzip.compress(b"prompt\tcompletion\n"), "CSV"),
    "page.jsonl": (b"\xef\xbb\xbf\n <html>", "a web page"),
    "rows.csv": (b"prompt,completion\nHi,Yes\n", "CSV.*to_json"),
    "page.json": (b"<!DOCTYPE html><html>", "a web page"),
    "lfs.json": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "wide.json": ('{"prompt": "a"}'.encode("utf-16"), "iconv -f utf-16"),
    "cut.parquet": (b"PAR1 cut", "not an intact parquet file"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name):
    raw, message = OTHER_KINDS[name]
    if name == "cut.parquet":
        pytest.importorskip("pyarrow", reason='reads Parquet by pyarrow: pip install -e ".[parquet]"')
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as e:
        read_rows(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_a_folder_and_a_pipe_are_called_so(tmp_path):
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(ValueError, match="a folder; .*for example train.jsonl.gz"):
        read_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe or a device.*write it to a file first"):
        read_rows(tmp_path / "pipe")


def test_one_object_over_several_lines_is_one_row_and_parquet_is_read(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "Hi", "completion": "Yes"}, indent=1))
    assert [turns(row) for _, row in read_rows(tmp_path / "one.json")] == [ONE]
    (tmp_path / "nested.json").write_text('{"version": 1,\n "data": [{"prompt": "Hi"}]}')
    (where, row), *_ = read_rows(tmp_path / "nested.json")
    with pytest.raises(ValueError, match="Are the rows in 'data'"):
        parse(where, row)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [U("Hi") | {"weight": None}, A("Yes") | {"weight": 1}], "text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows")
    assert [(where[-5:], turns(row)) for where, row in read_rows(tmp_path / "rows")] == [("row 1", ONE)]


# Content.


def test_a_models_digest_is_its_content_wherever_it_lies(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    Llama.from_pretrained(folder, seed=0).save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "copy" / "README.md").write_text("mine")
    first = digests.of_model(str(folder), folder)
    assert {digests.of_model(str(tmp_path / x), tmp_path / x) for x in ("m", "copy", "link")} == {first}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:] if "model" in name else raw + b"\n")
        assert digests.of_model(str(folder), folder) != first, name
        (folder / name).write_bytes(raw)
    assert digests.of_model(str(folder), folder) == first
    assert digests.of_model("organisation/model", tmp_path / "snapshots" / "0a1b") == "commit 0a1b"


def test_of_a_large_file_header_size_and_spread_megabytes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "weight_files", lambda folder: {"x": folder / "model.safetensors"})
    folder = tiny_folder(tmp_path / "m")
    Llama.from_pretrained(folder, seed=0).save_pretrained(folder)
    path, seen = folder / "model.safetensors", []
    raw, size = path.read_bytes(), 200 * 2**20
    for change in ((), (len(raw) + 5,), (size // 2,), (size - 1,)):
        path.write_bytes(raw)
        os.truncate(path, size)  # a hole of zeros behind the tensors
        with open(path, "r+b") as f:
            for at in change:
                f.seek(at)
                f.write(b"x" * (2**20 * 3 if at == size // 2 else 1))
        seen.append(digests.of_model(str(folder), folder))
    os.truncate(path, size - 2**20)
    os.truncate(path, size - 1)  # zeros alone, as at first, but for the size
    assert len({*seen, digests.of_model(str(folder), folder)}) == 5
