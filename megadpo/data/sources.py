"""Rows of a data set, wherever it lies: one dictionary per row, and where the row stands.

A source is a file (.jsonl, .ndjson, .json, .parquet, .arrow), a folder written by `datasets.save_to_disk`, or
a data set on the Hugging Face Hub. JSON is parsed here, because a bad line must be named by file and line
number. Parquet is streamed by pyarrow, because `datasets` would first write a second copy into its cache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megadpo.errors import DataError

Row = dict[str, Any]

BATCH_ROWS = 1000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ALLOWED = "give a .jsonl, .ndjson, .json, .parquet or .arrow file, a save_to_disk folder of `datasets`, or a Hub id"


def read_rows(source: str, split: str | None) -> Iterator[tuple[str, Row]]:
    """(origin, row) for every row of `source`, in its order.

    Origins: "pairs.jsonl:17" (line, from 1) for JSON lines, else "name[17]" (row, from 0). `split` is for Hub
    ids and DatasetDict folders; `train` where None. Raises DataError for whatever cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir():
        folder = _split_folder(path, split)
        name = path.name if folder == path else f"{path.name}/{folder.name}"
        yield from _read_dataset(name, _load_folder(folder))
    else:
        dataset = _load_from_hub(source, split)
        yield from _read_dataset(f"{source}/{split or 'train'}", dataset)


def source_digest(source: str, split: str | None) -> str:
    """sha256 over the contents of what `read_rows` would read, not its path; Hub: `datasets`' fingerprint."""
    path = Path(source).expanduser()
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        shards = sorted(_split_folder(path, split).glob("*.arrow"))
        return hashlib.sha256("".join(_file_digest(shard) for shard in shards).encode()).hexdigest()
    return str(_load_from_hub(source, split)._fingerprint)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _read_json_lines(path)
    elif suffix == ".json":
        yield from _read_json(path)
    elif suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".arrow":
        yield from _read_dataset(path.name, _load_arrow(path))
    else:
        raise DataError(f"{path}: a data file may not end in `{suffix}`; {ALLOWED}")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_json(data: bytes, path: Path, first_line: int) -> Any:
    """The JSON value in `data`, whose first line is line `first_line` of `path`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno}); mend or delete it"
        ) from error
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{first_line}: JSON that cannot be read ({error}); mend or delete it") from error


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parse_json(line.rstrip(b"\r\n"), path, number)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: a line must be a JSON object, found {kind(row)}")
                yield f"{path.name}:{number}", row


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of objects; a file that starts with an object is taken for JSON lines."""
    with _open(path) as file:
        data = file.read()
    if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        yield from _read_json_lines(path)
        return
    rows = _parse_json(data, path, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json file must hold a list of objects, found {kind(rows)}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}[{number}]: an item of the list must be an object, found {kind(row)}")
        yield f"{path.name}[{number}]", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    yield f"{path.name}[{number}]", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error


def _read_dataset(name: str, dataset: Any) -> Iterator[tuple[str, Row]]:
    """Rows of a `datasets.Dataset`."""
    number = 0
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield f"{name}[{number}]", dict(zip(batch, values, strict=True))
            number += 1


def _split_folder(path: Path, split: str | None) -> Path:
    """The folder of one Dataset: `path` itself, or the split's folder where `path` is a DatasetDict."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        wanted = split or "train"
        if wanted not in splits:
            raise DataError(f"{path}: no split `{wanted}`; it has {', '.join(splits)}: set data.split to one of them")
        return path / wanted
    if (path / "dataset_info.json").is_file():
        return path
    raise DataError(f"{path}: not a folder written by datasets' save_to_disk; {ALLOWED}")


def _load_folder(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{folder}: not a readable data set folder ({_first_line(error)})") from error


def _load_arrow(path: Path) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_file(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Arrow file ({_first_line(error)})") from error


def _load_from_hub(source: str, split: str | None) -> Any:
    if not HUB_ID.fullmatch(source) or Path(source).suffix in (
        ".jsonl",
        ".ndjson",
        ".json",
        ".parquet",
        ".arrow",
    ):
        raise DataError(f"{source}: no such file or folder; {ALLOWED}")
    import datasets

    try:
        return datasets.load_dataset(source, split=split or "train")
    except Exception as error:  # the Hub client has dozens of kinds, and each of them means the same to the user
        raise DataError(
            f"{source}: neither a file or folder here nor a data set that can be had from the Hub "
            f"({_first_line(error)}); {ALLOWED}"
        ) from error


def kind(value: object) -> str:
    """What a JSON value is, in the words of a message."""
    if value is None:
        return "null"
    names = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
