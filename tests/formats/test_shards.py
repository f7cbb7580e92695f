"""Directories of shards: reading, writing, and every way an index can lie."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import FormatError, MissingFileError, UnsafeArtifactError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_writer import write_safetensors
from halfbyte.formats.shards import open_shards, plan_shards, shard_file_names, write_index

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2), "c": torch.arange(4)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_model(directory: Path) -> None:
    for file, names in {FIRST: ["a", "b"], SECOND: ["c"]}.items():
        write_safetensors(directory / file, {name: TENSORS[name] for name in names})
    write_index(directory, [SafetensorsFile.open(directory / f) for f in (FIRST, SECOND)])


def edit_index(directory: Path, **changes: object) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    for name, file in changes.items():
        content["weight_map"].pop(name, None)
        if file is not None:
            content["weight_map"][name] = file
    path.write_text(json.dumps(content))


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_model(tmp_path)
    shards = open_shards(tmp_path)
    assert sorted(shards) == ["a", "b", "c"]
    assert len(shards) == 3
    assert [file.path.name for file in shards.files] == [FIRST, SECOND]
    mapped = shards.map()
    for name, tensor in TENSORS.items():
        assert torch.equal(shards.read(name), tensor)
        assert torch.equal(mapped.tensor(name), tensor)
    file, entry = shards["c"]
    assert (file.path.name, entry.name, entry.shape) == (SECOND, "c", (4,))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12 + 8 + 32}
    assert index["weight_map"] == {"a": FIRST, "b": FIRST, "c": SECOND}


def test_a_single_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    shards = open_shards(tmp_path)
    assert torch.equal(shards.map().tensor("c"), load_file(tmp_path / "model.safetensors")["c"])


def test_links_to_regular_files_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_safetensors(blobs / "1234", TENSORS)
    (snapshot / "model.safetensors").symlink_to("../blobs/1234")
    assert sorted(open_shards(snapshot)) == ["a", "b", "c"]


def test_unknown_names(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    shards = open_shards(tmp_path)
    for read in (shards.read, shards.map().tensor):
        with pytest.raises(FormatError, match="no tensor 'd' among 3"):
            read("d")


def test_neither_and_both(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="found neither"):
        open_shards(tmp_path)
    write_model(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(FormatError, match="holds both"):
        open_shards(tmp_path)


def test_all_disagreements_at_once(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_safetensors(tmp_path / "third.safetensors", {"a": TENSORS["a"], "d": TENSORS["b"]})
    (tmp_path / "damaged.safetensors").write_bytes(b"short")
    edit_index(
        tmp_path,
        b=None,
        e=FIRST,
        f="gone.safetensors",
        g="third.safetensors",
        h="damaged.safetensors",
    )
    with pytest.raises(FormatError) as caught:
        open_shards(tmp_path)
    assert set(caught.value.problems) == {
        f"'b': in {FIRST}, not in the index",
        f"'e': in {FIRST} by the index, not in that file",
        "gone.safetensors: named by the index, missing from the directory",
        f"'a': in {FIRST} and in third.safetensors",
        "'d': in third.safetensors, not in the index",
        "'g': in third.safetensors by the index, not in that file",
        "damaged.safetensors: at least 10 bytes expected, found 5",
    }


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model.bin",
        "..",
        "",
        "nul\0.safetensors",
    ],
)
def test_names_stay_in_the_directory(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    edit_index(tmp_path, a=name)
    with pytest.raises(UnsafeArtifactError, match="plain names in its directory: 1 problem"):
        open_shards(tmp_path)


@pytest.mark.parametrize("value", [7, [FIRST], {"file": FIRST}, True])
def test_file_names_are_text(tmp_path: Path, value: object) -> None:
    write_model(tmp_path)
    edit_index(tmp_path, a=value)
    with pytest.raises(FormatError, match="'a': a file name expected, found"):
        open_shards(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_has_a_weight_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="weight_map: an object of tensor name to file name"):
        open_shards(tmp_path)


def test_a_plan_keeps_order_and_never_cuts_a_group() -> None:
    groups = [{"a": 4, "a.scales": 2}, {"b": 5}, {"c": 100, "c.scales": 1}, {"d": 1}]
    assert plan_shards(groups, max_bytes=10) == [
        ["a", "a.scales"],
        ["b"],
        ["c", "c.scales"],
        ["d"],
    ]
    assert plan_shards(groups) == [["a", "a.scales", "b", "c", "c.scales", "d"]]
    assert plan_shards([]) == []


def test_file_names_are_those_of_hugging_face() -> None:
    assert shard_file_names(1) == ["model.safetensors"]
    assert shard_file_names(2) == [FIRST, SECOND]
