"""A benchmark's rows: where they lie under `--data` and on the Hub, how many there must be; their fields, checked."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from published.files import read_text
from published.rows import read_parquet, read_rows

READ = (".parquet", ".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Row:
    """One row of a data file, whose fields are read by type; `where` names file and line in errors."""

    where: str
    fields: dict

    def get(self, name: str, kind: type = str):
        """A field of this type; ValueError where it is missing or of another."""
        value = self.fields.get(name)
        if not isinstance(value, kind):
            found = f"it is {value!r:.60}" if name in self.fields else f"the row has {', '.join(map(str, self.fields))}"
            expected = f"{self.where}: expected {name} ({kind.__name__}), but {found}"
            raise ValueError(f"{expected}; is this the benchmark's own file?")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        values = self.get(name, list)
        if not values or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{self.where}: expected {name} to be a list of strings, but it is {values!r:.60}")
        return tuple(values)

    def row(self, name: str) -> "Row":
        return Row(f"{self.where}: {name}", self.get(name, dict))

    def index(self, name: str, options: tuple[str, ...]) -> int:
        """The place of a field's value, a text or a number, among the options."""
        value = str(self.fields.get(name)).strip()
        if value not in options:
            raise ValueError(f"{self.where}: {name} is {value!r}, expected one of {', '.join(options)}")
        return options.index(value)


@dataclass(frozen=True)
class Source:
    """One split of a benchmark: its file under `--data`, under the name it was released with or as the Hub has it."""

    folder: str  # under --data
    file: str  # as released; may be gzipped
    repository: str  # on the Hub
    pattern: str  # of its files there, which keep their paths under `folder`
    rows: int  # of the complete split

    def paths(self, data: Path) -> list[Path]:
        """The files that hold the split, [] where there are none."""
        folder = Path(data) / self.folder
        for path in (folder / self.file, folder / f"{self.file}.gz"):
            if path.is_file():
                return [path]
        return sorted(path for path in folder.glob(self.pattern) if path.name.removesuffix(".gz").endswith(READ))

    def read(self, data: Path) -> list[Row]:
        """Every row of the split, in the file's order; ValueError where it is missing, damaged or cut short."""
        tasks = "truthfulqa_mc,truthfulqa_gen" if self.folder == "truthfulqa" else self.folder
        fetch = f"fetch it with: python -m eval.download --tasks {tasks} --to {data}"
        if not Path(data).is_dir():
            raise ValueError(f"{data}: no such folder; --data holds a folder for each benchmark; {fetch}")
        paths = self.paths(data)
        if not paths:
            where = Path(data) / self.folder
            raise ValueError(f"{where}: no {self.file} (or .gz), nor the Hub's {self.pattern}; {fetch}")
        rows = [row for path in paths for row in read_file(path)]
        if len(rows) != self.rows:
            found = f"{len(rows):,} rows, but the benchmark has {self.rows:,}"
            raise ValueError(f"{', '.join(map(str, paths))}: {found}; cut short? Move it away and {fetch}")
        return rows


def read_file(path: Path) -> list[Row]:
    """The rows of a JSON, JSONL, CSV (each perhaps gzipped) or parquet file."""
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    elif ".csv" in path.suffixes:
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        except csv.Error as e:
            raise ValueError(f"{path}: not CSV ({e}); is a quotation mark left open?") from e
    else:
        return [Row(where, row) for where, row in read_rows(path)]
    return [Row(f"{path}: row {i}", row) for i, row in enumerate(rows, 1)]
