"""GGUF files byte by byte, so that tests can tell lies the library would not write."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

TYPES = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9, "u64": 10}
FORMS = {"u8": "<B", "u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?", "u64": "<Q"}

Typed = tuple[str, object]


@dataclass
class Info:
    """One tensor; fields may lie."""

    name: str
    shape: Sequence[int]  # as torch has it
    type_number: int
    data: bytes
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def plain(kind: str, value: object) -> bytes:
    return string(value) if kind == "str" else struct.pack(FORMS[kind], value)  # type: ignore[arg-type]


def typed(value: Typed) -> bytes:
    kind, content = value
    if not kind.startswith("["):
        return struct.pack("<I", TYPES[kind]) + plain(kind, content)
    inner, items = kind[1:], list(content)  # type: ignore[call-overload]
    head = struct.pack("<IIQ", TYPES["array"], TYPES[inner], len(items))
    return head + b"".join(plain(inner, item) for item in items)


def build(
    metadata: Mapping[str, Typed] | Sequence[tuple[str, Typed]],
    infos: Sequence[Info] = (),
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    out += b"".join(string(key) + typed(value) for key, value in pairs)
    data = b""
    for info in infos:
        offset = len(data) if info.offset is None else info.offset
        out += string(info.name) + struct.pack("<I", len(info.shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(info.shape))
        out += struct.pack("<IQ", info.type_number, offset)
        data += info.data + b"\0" * (-len(info.data) % alignment)
    return out + b"\0" * (-len(out) % alignment) + data


def tensor(name: str, values: np.ndarray) -> Info:
    """A float32 tensor."""
    return Info(name, values.shape, GGMLQuantizationType.F32, values.astype("<f4").tobytes())


def random_blocks(name: str, kind: GGMLQuantizationType, shape: tuple[int, int]) -> Info:
    """A tensor of any type with random contents and modest scales."""
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(len(name))
    raw = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        dtype = np.float16 if kind is GGMLQuantizationType.F16 else np.float32
        values = rng.standard_normal(shape).astype(dtype)
        raw = values.view(np.uint16)[:, 1::2] if kind is GGMLQuantizationType.BF16 else values
        return Info(name, shape, kind, raw.tobytes())
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    at = {"Q6_K": size - 2}.get(kind.name, 0)
    raw[:, at : at + 2] = scale
    if kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        raw[:, 2:4] = scale
    return Info(name, shape, kind, raw.tobytes())
