"""Reading and writing safetensors, with the safetensors library as oracle."""

import gc
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.errors import FormatError, MissingFileError
from halfbyte.formats.safetensors_file import SafetensorsFile
from halfbyte.formats.safetensors_header import DTYPES
from halfbyte.formats.safetensors_writer import (
    MAX_LATE_BYTES,
    SafetensorsWriter,
    TensorSpec,
    write_safetensors,
)

# The library's Python side cannot read these two; its Rust side and ours can.
UNREADABLE_THERE = {torch.float8_e8m0fnu}


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = TensorSpec(dtype, shape).nbytes
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return (raw & 1 if dtype == torch.bool else raw).view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


dtypes = st.sampled_from(sorted(DTYPES.values(), key=str))
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(min_size=0, max_size=12).filter(lambda n: n != "__metadata__")
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(
    specs=st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=1),
)
def test_bytes_are_those_of_the_library_and_both_read_them(
    tmp_path: Path,
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    tensors = {name: random_bytes(*spec, seed=i) for i, (name, spec) in enumerate(specs.items())}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, tensors, metadata)
    save_file({n: t.clone() for n, t in tensors.items()}, theirs, metadata=metadata or None)
    assert ours.read_bytes() == theirs.read_bytes()
    file = SafetensorsFile.open(theirs)
    assert dict(file.metadata) == metadata
    assert set(file.entries) == set(tensors)
    mapped = file.map()
    for name, tensor in tensors.items():
        assert same_bits(file.read(name), tensor)
        assert same_bits(mapped.tensor(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_of_the_format(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": random_bytes(dtype, (3, 5)), "scalar": random_bytes(dtype, ())}
    write_safetensors(path, tensors)
    file = SafetensorsFile.open(path)
    for name, tensor in tensors.items():
        assert same_bits(file.read(name), tensor)
        assert same_bits(file.map().tensor(name), tensor)
        if dtype not in UNREADABLE_THERE:
            assert same_bits(load_file(path)[name], tensor)


def test_the_order_of_the_tensors_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(5, dtype=torch.uint8), "c": torch.ones(2)}
    write_safetensors(tmp_path / "1", tensors, {"x": "1", "y": "2"})
    write_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_non_contiguous_tensors_are_written_in_row_major_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write_safetensors(tmp_path / "x", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "x")["t"], tensor)


def shifted(tmp_path: Path) -> Path:
    """A file that the library accepts, with a float32 at an odd position."""
    header = (
        b'{"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path = tmp_path / "shifted.safetensors"
    data = b"\x07" + struct.pack("<2f", 1.5, -2.0)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    path = shifted(tmp_path)
    with safe_open(path, "pt") as theirs:
        assert torch.equal(theirs.get_tensor("f"), torch.tensor([1.5, -2.0]))
    tensor = SafetensorsFile.open(path).map().tensor("f")
    assert torch.equal(tensor, torch.tensor([1.5, -2.0]))
    tensor.zero_()  # a copy: writing to it is allowed


def test_mapped_tensors_share_the_pages_and_outlive_the_map(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.arange(1000.0), "u": torch.ones(7)})
    mapped = SafetensorsFile.open(path).map()
    mapped.advise("t", 3)  # MADV_WILLNEED
    first, again = mapped.tensor("t"), mapped.tensor("t")
    assert first.data_ptr() == again.data_ptr()
    assert first.untyped_storage().nbytes() == 4000
    del mapped, again
    gc.collect()
    path.unlink()
    assert torch.equal(first, torch.arange(1000.0))


def test_writing_to_a_mapped_tensor_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.arange(1000.0)})
    code = (
        "import sys; from halfbyte.formats.safetensors_file import SafetensorsFile\n"
        "t = SafetensorsFile.open(sys.argv[1]).map().tensor('t')\n"
        "assert t.sum() == 499500; print('read', flush=True); t[0] = 1; print('written')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "read\n"
    assert done.returncode == -signal.SIGSEGV


def test_empty_tensors_and_advice_for_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.empty(0, 3)})
    mapped = SafetensorsFile.open(path).map()
    mapped.advise("t", 3)
    assert mapped.tensor("t").shape == (0, 3)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({}, path)
    assert not SafetensorsFile.open(path).entries


@pytest.mark.parametrize("use", ["read", "map"])
@pytest.mark.parametrize("change", ["truncated", "replaced", "rewritten"])
def test_a_file_that_changed_since_it_was_opened(tmp_path: Path, use: str, change: str) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.arange(1000.0)})
    file = SafetensorsFile.open(path)
    if change == "truncated":
        os.truncate(path, 2000)
    elif change == "replaced":
        write_safetensors(path, {"t": torch.arange(1000.0)})
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(FormatError, match=r"x.safetensors changed since it was opened"):
        file.map() if use == "map" else file.read("t")


def test_a_file_removed_since_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.arange(10.0)})
    file = SafetensorsFile.open(path)
    path.unlink()
    with pytest.raises(MissingFileError, match="no such file"):
        file.read("t")


def test_an_unknown_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.arange(10.0)})
    with pytest.raises(FormatError, match="no tensor 'v' among 1"):
        SafetensorsFile.open(path).read("v")


def test_a_boolean_must_be_0_or_1(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"t": torch.tensor([True, False])})
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    file = SafetensorsFile.open(path)
    for read in (file.read, file.map().tensor):
        with pytest.raises(FormatError, match=r"x.safetensors: 't': booleans of 0 or 1"):
            read("t")


# Writing piece by piece.


def late_bytes(count: int) -> Tensor:
    return torch.arange(count).to(torch.uint8)


@pytest.mark.parametrize("count", [0, 1, 170, MAX_LATE_BYTES])
def test_late_tensors_come_last_and_the_library_reads_the_file(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.safetensors"
    specs = {"w": TensorSpec(torch.uint8, (5, 1)), "n": TensorSpec(torch.float32, (3,))}
    with SafetensorsWriter.open(path, specs, late=["w.json", "v.json"]) as writer:
        writer.write("v.json", late_bytes(count))
        writer.write("w", late_bytes(5).view(5, 1))
        writer.write("w.json", late_bytes(3))
        writer.write("n", torch.ones(3))
    theirs = load_file(path)
    assert torch.equal(theirs["v.json"], late_bytes(count))
    assert torch.equal(theirs["w.json"], late_bytes(3))
    assert torch.equal(theirs["n"], torch.ones(3))
    assert list(SafetensorsFile.open(path).entries) == ["n", "w", "w.json", "v.json"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", torch.ones(2), "'x': not among those announced"),
        ("t", torch.ones(3), r"'t': float32 \[2\] announced, found float32 \[3\]"),
        ("t", torch.ones(2).half(), r"'t': float32 \[2\] announced, found float16 \[2\]"),
        ("done", torch.ones(1), "'done': written already"),
        ("late", late_bytes(MAX_LATE_BYTES + 1), r"uint8 \[at most 9999\], found uint8 \[10000\]"),
        ("late", torch.ones(2), r"uint8 \[at most 9999\], found float32 \[2\]"),
        ("late", late_bytes(4).view(2, 2), r"found uint8 \[2, 2\]"),
        ("later", late_bytes(1), "'later': written already"),
    ],
)
def test_refused_writes_leave_nothing(
    tmp_path: Path, name: str, tensor: Tensor, message: str
) -> None:
    specs = {"t": TensorSpec(torch.float32, (2,)), "done": TensorSpec(torch.float32, (1,))}

    def write() -> None:
        with SafetensorsWriter.open(tmp_path / "x", specs, late=["late", "later"]) as writer:
            writer.write("done", torch.zeros(1))
            writer.write("later", late_bytes(1))
            writer.write(name, tensor)

    with pytest.raises(FormatError, match=message):
        write()
    assert not list(tmp_path.iterdir())


def test_every_announced_tensor_must_be_written(tmp_path: Path) -> None:
    specs = {"t": TensorSpec(torch.float32, (2,))}
    with (
        pytest.raises(FormatError, match="announced and not written: 2 problems\n  'l'\n  't'"),
        SafetensorsWriter.open(tmp_path / "x", specs, late=["l"]),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_syncing_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    specs = {"t": TensorSpec(torch.float32, (2,)), "u": TensorSpec(torch.float32, (2,))}
    with SafetensorsWriter.open(tmp_path / "x", specs) as writer:
        writer.write("t", torch.ones(2))
        writer.sync()
        writer.write("u", torch.zeros(2))
    assert len(synced) == 1
    assert torch.equal(load_file(tmp_path / "x")["t"], torch.ones(2))


def test_an_exception_leaves_an_older_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    specs = {"t": TensorSpec(torch.float32, (2,))}
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter.open(path, specs):
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_and_dtypes_that_files_cannot_hold(tmp_path: Path) -> None:
    specs = {
        "c": TensorSpec(torch.complex128, (1,)),
        "twice": TensorSpec(torch.uint8, (1,)),
        "__metadata__": TensorSpec(torch.uint8, (1,)),
        "\ud800": TensorSpec(torch.uint8, (1,)),
    }
    with (
        pytest.raises(FormatError) as caught,
        SafetensorsWriter.open(tmp_path / "x", specs, late=["twice"]),
    ):
        pass
    assert len(caught.value.problems) == 4
    for part in ("complex128", "'twice': twice", "not Unicode", "__metadata__: not a name"):
        assert part in str(caught.value)


def test_more_tensors_than_a_file_is_read_with(tmp_path: Path) -> None:
    specs = {str(i): TensorSpec(torch.uint8, ()) for i in range(50_001)}
    with (
        pytest.raises(FormatError, match="at most 50000 tensors expected, found 50001"),
        SafetensorsWriter.open(tmp_path / "x", specs),
    ):
        pass
