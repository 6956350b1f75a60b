"""A benchmark's rows: where they lie under `--data` and on the Hub, how many there must be; their fields, checked."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from published.files import read_text
from published.rows import half_pair, read_parquet, read_rows

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

    def choices(self, found: tuple[str, ...], counts: tuple[int, ...] | range) -> tuple[str, ...]:
        """The choices, if there are as many as a question of this benchmark has, and none is empty."""
        if len(found) not in counts:
            expected = " or ".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"
            raise ValueError(f"{self.where}: {len(found)} choices, expected {expected}")
        if blank := [i for i, choice in enumerate(found) if not choice.strip()]:
            raise ValueError(f"{self.where}: choice {blank[0]} of {len(found)} is empty (counted from 0)")
        return found

    def row(self, name: str) -> "Row":
        return Row(f"{self.where}: {name}", self.get(name, dict))

    def index(self, name: str, options: tuple[str, ...]) -> int:
        """The place of a field's value, a text or a number, among the options."""
        value = str(self.fields.get(name)).strip()
        if len({*options}) < len(options):
            raise ValueError(f"{self.where}: one label twice among {', '.join(options)}")
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
    released: str = ""  # pattern of its CSV files, where it was released as several without a header
    columns: tuple[str, ...] = ()  # of these
    tasks: str = ""  # whose download brings it, if it is not the folder's name
    other: str = ""  # another release, by its number of rows: "N: what it is"

    def paths(self, data: Path) -> list[Path]:
        """The files that hold the split, [] where there are none."""
        folder = Path(data) / self.folder
        for path in (folder / self.file, folder / f"{self.file}.gz"):
            if path.is_file():
                return [path]
        if self.released and (found := sorted(folder.rglob(self.released))):
            return found
        return sorted(path for path in folder.glob(self.pattern) if path.name.removesuffix(".gz").endswith(READ))

    def read(self, data: Path) -> list[Row]:
        """Every row of the split, in the file's order; ValueError where it is missing, damaged or cut short."""
        paths, fetch = self.paths(data), how_to_fetch([self.tasks or self.folder], data)
        if not paths:
            raise ValueError(f"{self.missing(data)}; {fetch}")
        rows = [row for path in paths for row in read_file(path, self.columns)]
        if len(rows) != self.rows:
            count, _, what = self.other.partition(": ")
            why = what if count == str(len(rows)) else "cut short?"
            found = f"{len(rows):,} rows, but the benchmark has {self.rows:,}; {why}"
            raise ValueError(f"{listed(paths)}: {found} Move {'it' if len(paths) == 1 else 'them'} away and {fetch}")
        return rows

    def missing(self, data: Path) -> str:
        if not Path(data).is_dir():
            return f"{data}: no such folder; --data holds a folder for each benchmark"
        names = [f"{self.file} (or .gz)", self.released, f"the Hub's {self.pattern}"]
        return f"{Path(data) / self.folder}: no {', nor '.join(filter(None, names))}"


def how_to_fetch(tasks: list[str], data: Path) -> str:
    return f"fetch with: python -m eval.download --tasks {','.join(tasks)} --to {quote(str(data))}"


def listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths)) if len(paths) < 4 else f"{paths[0]} and {len(paths) - 1} more"


def read_file(path: Path, columns: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a JSON, JSONL, CSV (each perhaps gzipped) or parquet file; columns: of a CSV without a header."""
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    elif ".csv" in path.suffixes:
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), columns or None))
            rows = [row | {"file": path.stem} for row in rows] if columns else rows
        except csv.Error as e:
            raise ValueError(f"{path}: not CSV ({e}); is a quotation mark left open?") from e
    else:
        found = [Row(where, row) for where, row in read_rows(path)]
        for row in found:  # the other kinds hold no half of a pair
            intact(row.where, row.fields)
        return found
    return [Row(f"{path}: row {i}", row) for i, row in enumerate(rows, 1)]


def intact(where: str, value, name: str = "") -> None:
    """ValueError for a text within a row's value that is not Unicode."""
    if isinstance(value, str) and (half := half_pair(value)):
        raise ValueError(f"{where}: {name} holds {half}, half of a surrogate pair")
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if isinstance(key, str):
            intact(where, key, f"a name in {name or 'the row'}")
        intact(where, part, f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}".lstrip("."))
