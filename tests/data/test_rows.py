"""Rows out of every kind of file, and the place of each fault."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from halfbyte.data.problems import Problems
from halfbyte.data.rows import Row, read_rows
from halfbyte.data.sources import find_sources
from halfbyte.errors import MissingPackageError

ROWS = [
    {"prompt": 'a, "quoted"', "completion": "two\nlines"},
    {"prompt": "ünïcode \U0001f600", "completion": "tab\there"},
    {"prompt": "", "completion": "x" * 200_000},
]


def read(path: Path) -> tuple[list[Row], list[str]]:
    problems = Problems()
    (file,) = find_sources(path).files
    return list(read_rows(file, problems)), problems.listed


def separated(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


FILES = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in ROWS).encode(),
    "array.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "object.json": json.dumps({"version": {"n": [1]}, "data": ROWS, "end": None}).encode(),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    rows, problems = read(tmp_path / name)
    assert problems == []
    assert [row.fields for row in rows] == ROWS


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(ROWS), out)
    content = out.getvalue()
    if suffix:
        content = gzip.compress(content)
    path = tmp_path / f"a.parquet{suffix}"
    path.write_bytes(content)
    rows, problems = read(path)
    assert problems == []
    assert [row.fields for row in rows] == ROWS
    assert [str(row.origin) for row in rows] == [f"a.parquet{suffix}:row {n}" for n in (1, 2, 3)]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    rows, problems = read(tmp_path / "a.parquet")
    assert rows == []
    assert problems[0].startswith("a.parquet:row 1: not Parquet: ")


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1}, {"a":\n2},\n\n{"a": 3}]\n')
    rows, _ = read(tmp_path / "a.json")
    assert [row.origin.number for row in rows] == [2, 2, 5]
    (tmp_path / "a.csv").write_text('a,b\n1,"two\nlines"\n3,4\n')
    rows, _ = read(tmp_path / "a.csv")
    assert [row.origin.number for row in rows] == [2, 4]


DEEP = "[" * 100_000

FAULTS = [
    pytest.param(
        "a.jsonl",
        '{"a": 1}\n{"a": \n{"a": 2}\n',
        2,
        ["a.jsonl:2: not JSON: Expecting value at column 6"],
        id="cut-off",
    ),
    pytest.param(
        "a.jsonl", '{"a": NaN}\n', 0, ["a.jsonl:1: not JSON: NaN is not a number of JSON"], id="nan"
    ),
    pytest.param(
        "a.jsonl",
        '[1]\n"x"\n1\n',
        0,
        [
            "a.jsonl:1: an object expected, found a list",
            "a.jsonl:2: an object expected, found text",
            "a.jsonl:3: an object expected, found a whole number",
        ],
        id="not-objects",
    ),
    pytest.param(
        "a.jsonl",
        '{"a": 1}\n\n\n{"a": 1}\n{}\n\n',
        2,
        ["a.jsonl:2: empty row", "a.jsonl:5: empty row"],
        id="empty",
    ),
    pytest.param(
        "a.jsonl",
        b'{"a": 1}\n{"a": "\xff"}\n{"a": 1}\n',
        2,
        ["a.jsonl:2: not UTF-8 text at byte 7"],
        id="not-utf8",
    ),
    pytest.param(
        "a.jsonl",
        f'{{"a": {DEEP}\n{{"a": 1}}\n',
        1,
        ["a.jsonl:1: JSON nested too deeply"],
        id="deep",
    ),
    pytest.param(
        "a.jsonl",
        '{"a": ' + "9" * 5000 + "}\n",
        0,
        ["a.jsonl:1: not JSON: Exceeds the limit"],
        id="huge-number",
    ),
    pytest.param(
        "a.json",
        '[{"a": 1},\n{"a": }]',
        1,
        ["a.json:2: not JSON: Expecting value at column 7"],
        id="array-cut",
    ),
    pytest.param(
        "a.json",
        '[{"a": 1}\n{"a": 2}]',
        1,
        ["a.json:2: not JSON: ',' or ']' expected, found '{'"],
        id="no-comma",
    ),
    pytest.param(
        "a.json",
        '[{"a": 1}',
        1,
        ["a.json:1: not JSON: ',' or ']' expected, found the end of the file"],
        id="no-end",
    ),
    pytest.param(
        "a.json", '[{"a": 1}]\nx', 1, ["a.json:2: not JSON: 'x' after the end"], id="trailing"
    ),
    pytest.param(
        "a.json",
        "[\n1]",
        0,
        ["a.json:2: an object expected, found a whole number"],
        id="array-of-numbers",
    ),
    pytest.param(
        "a.json",
        '{"a": 1}',
        0,
        ["a.json:1: an object with one list of rows expected, found no list"],
        id="no-list",
    ),
    pytest.param(
        "a.json",
        '{"a": [{"x": 1}], "b": [{"x": 1}]}',
        2,
        ["a.json:1: an object with one list of rows expected, found lists a, b"],
        id="two-lists",
    ),
    pytest.param(
        "a.json",
        "",
        0,
        [
            "a.json:1: an array of rows, or an object with a list of them expected, found an empty file"
        ],
        id="json-empty",
    ),
    pytest.param(
        "a.json",
        b'[\n{"a": "\xff"}]',
        0,
        ["a.json:2: not UTF-8 text at byte 9 of the file"],
        id="json-not-utf8",
    ),
    pytest.param("a.json", "[" + DEEP, 0, ["a.json:1: JSON nested too deeply"], id="json-deep"),
    pytest.param(
        "a.csv",
        "a,b\n1,2\n1,2,3\n,\n1\n",
        1,
        [
            "a.csv:3: 2 columns expected, found 3",
            "a.csv:4: empty row",
            "a.csv:5: 2 columns expected, found 1",
        ],
        id="columns",
    ),
    pytest.param(
        "a.csv",
        "a,a,\n1,2,3\n",
        0,
        ["a.csv:1: column names must be given and differ, found '', 'a'"],
        id="header",
    ),
    pytest.param(
        "a.csv", 'a,b\n1,2\n"x"y,2\n', 1, ["a.csv:3: not CSV: ',' expected after '\"'"], id="quotes"
    ),
    pytest.param(
        "a.csv",
        'a,b\n1,"no end\n',
        0,
        ["a.csv:2: not CSV: unexpected end of data"],
        id="open-quote",
    ),
    pytest.param(
        "a.tsv", b"a\tb\n1\t\xff\n", 0, ["a.tsv:2: not UTF-8 text at byte 2"], id="tsv-not-utf8"
    ),
]


@pytest.mark.parametrize(("name", "content", "num_rows", "expected"), FAULTS)
def test_faults_are_named_and_reading_goes_on(
    tmp_path: Path, name: str, content: str | bytes, num_rows: int, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    rows, problems = read(tmp_path / name)
    assert len(rows) == num_rows
    assert len(problems) == len(expected)
    for problem, beginning in zip(problems, expected, strict=True):
        assert problem.startswith(beginning)


def test_a_damaged_compressed_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    rows, problems = read(tmp_path / "a.jsonl.gz")
    assert rows == []
    assert problems[0].startswith("a.jsonl.gz: damaged compressed file")
