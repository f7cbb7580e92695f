"""4-bit tensors under bitsandbytes' own names, so that its users can read ours and we theirs.

A weight `P` of N elements in blocks of S becomes (those with a star only if double-quantized):

    P                                uint8 [ceil(N / 2), 1]                codes
    P.absmax                         float32, or uint8*, [ceil(N / S)]     scales
    P.quant_map                      float32 [16]                          codebook
    P.nested_absmax *                float32 [ceil(N / S / 256)]           second-level scales
    P.nested_quant_map *             float32 [256]                         dynamic map
    P.quant_state.bitsandbytes__nf4  uint8                                 JSON: the rest

bitsandbytes has no INT4. Ours differs in the last name, `P.quant_state.halfbyte__int4`, so that no
reader takes it for NF4; `int4_affine` adds `P.zero_points` and `P.nested_zero_points`.
"""

import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.bitsandbytes_reading import PARTS, STATE, STATE_NAMES, from_bitsandbytes
from halfbyte.formats.checks import dtype_name
from halfbyte.formats.codebooks import (
    FOUR_BIT_CODEBOOKS,
    FP4,
    INT4_AFFINE,
    NF4,
    Codebook,
    find_codebook,
)
from halfbyte.formats.double_quantization import NESTED_BLOCK_SIZE, DoubleQuantized
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.formats.safetensors_header import shortened
from halfbyte.formats.safetensors_writer import TensorSpec

__all__ = [
    "from_bitsandbytes",
    "part_specs",
    "quantization_config",
    "quantized_names",
    "to_bitsandbytes",
]


def to_bitsandbytes(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The parts of a 4-bit weight as bitsandbytes stores them, by their names in files.

    The codes and scales are those of `quantized`, not copies.

    Args:
        name: Of the weight, such as `model.layers.0.self_attn.q_proj.weight`.
        quantized: Any codebook of `FOUR_BIT_CODEBOOKS`; for NF4 and FP4 the result is what
            bitsandbytes' `QuantState.as_dict(packed=True)` gives, and the codes.

    Raises:
        UnsupportedError: A codebook of one's own, which no reader would know; or scales and
            zero-points that are not double-quantized alike.
    """
    book = quantized.codebook
    if FOUR_BIT_CODEBOOKS.get(book.name) != book:
        known = ", ".join(FOUR_BIT_CODEBOOKS)
        raise UnsupportedError(
            f"{name}: codebook {book.name!r} has no name in files; those of {known} have"
        )
    scales, zero_points = quantized.stored_scales, quantized.stored_zero_points
    parts = {name: quantized.codes.view(-1, 1)}
    state: dict[str, object] = {
        "quant_type": book.name,
        "blocksize": quantized.block_size,
        "dtype": dtype_name(quantized.dtype),
        "shape": list(quantized.shape),
    }
    table = book.table(quantized.device).clone()  # saving refuses tensors that share memory
    if isinstance(scales, DoubleQuantized):
        parts[f"{name}.absmax"] = scales.codes
        parts[f"{name}.quant_map"] = table
        parts[f"{name}.nested_absmax"] = scales.scales
        parts[f"{name}.nested_quant_map"] = scales.codebook.table(quantized.device).clone()
        state["nested_blocksize"] = scales.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = scales.offset
    else:
        parts[f"{name}.absmax"] = scales
        parts[f"{name}.quant_map"] = table
    if zero_points is not None:
        if not _alike(scales, zero_points):
            raise UnsupportedError(f"{name}: scales and zero-points are quantized differently")
        if isinstance(zero_points, DoubleQuantized):
            parts[f"{name}.zero_points"] = zero_points.codes
            parts[f"{name}.nested_zero_points"] = zero_points.scales
            state["nested_zero_points_offset"] = zero_points.offset
        else:
            parts[f"{name}.zero_points"] = zero_points
    text = json.dumps(state).encode()
    parts[f"{name}{STATE}{STATE_NAMES[book.name]}"] = torch.frombuffer(
        bytearray(text), dtype=torch.uint8
    ).to(quantized.device)
    return parts


def _alike(scales: Tensor | DoubleQuantized, zero_points: Tensor | DoubleQuantized) -> bool:
    if isinstance(scales, DoubleQuantized) and isinstance(zero_points, DoubleQuantized):
        return (scales.block_size, scales.codebook) == (
            zero_points.block_size,
            zero_points.codebook,
        )
    return isinstance(scales, Tensor) and isinstance(zero_points, Tensor)


def part_specs(
    name: str,
    shape: Sequence[int],
    codebook: str | Codebook,
    *,
    block_size: int,
    double_quant: bool,
) -> tuple[dict[str, TensorSpec], str]:
    """What `to_bitsandbytes` will give for a weight that is not quantized yet.

    Returns:
        The specs of all parts but the JSON, and the name of the JSON part, whose length depends on
        the values: a late tensor of `SafetensorsWriter`.
    """
    book = find_codebook(codebook)
    num_elements = torch.Size(shape).numel()
    num_blocks = -(-num_elements // block_size)
    of_blocks = TensorSpec(torch.uint8 if double_quant else torch.float32, (num_blocks,))
    nested = TensorSpec(torch.float32, (-(-num_blocks // NESTED_BLOCK_SIZE),))
    specs = {
        name: TensorSpec(torch.uint8, ((num_elements + 1) // 2, 1)),
        f"{name}.absmax": of_blocks,
        f"{name}.quant_map": TensorSpec(torch.float32, (16,)),
    }
    if double_quant:
        specs[f"{name}.nested_absmax"] = nested
        specs[f"{name}.nested_quant_map"] = TensorSpec(torch.float32, (256,))
    if book == INT4_AFFINE:
        specs[f"{name}.zero_points"] = of_blocks
        if double_quant:
            specs[f"{name}.nested_zero_points"] = nested
    return specs, f"{name}{STATE}{STATE_NAMES[book.name]}"


def quantized_names(names: Iterable[str]) -> set[str]:
    """The 4-bit weights among the tensors of a checkpoint.

    Args:
        names: Of all its tensors.

    Raises:
        FormatError: A part belongs to no weight, a weight has a part that is not known or more
            than one state, or its codes are missing; all are listed.
    """
    everything = set(names)
    states = sorted(name for name in everything if STATE in name)
    weights = {state.partition(STATE)[0] for state in states}
    problems = [
        f"{state}: a state of {' or '.join(STATE_NAMES.values())} expected"
        for state in states
        if state.partition(STATE)[2] not in STATE_NAMES.values()
    ]
    if len(weights) < len(states):
        problems.append(f"{len(states)} states for {len(weights)} weights: one each expected")
    problems += [f"{weight}: its codes are missing" for weight in sorted(weights - everything)]
    for name in sorted(everything):
        weight, _, part = name.rpartition(".")
        if weight in weights and part not in PARTS:
            problems.append(f"{name}: not a part of a 4-bit weight that is known")
        elif part in PARTS and weight not in weights:
            problems.append(f"{name}: part of a 4-bit weight without {weight}{STATE}...")
    if problems:
        raise FormatError("not the parts of 4-bit weights", problems=shortened(problems))
    return weights


def quantization_config(
    codebook: str | Codebook = "nf4",
    *,
    block_size: int,
    double_quant: bool,
    compute_dtype: torch.dtype = torch.bfloat16,
    skip_modules: Sequence[str] | None = None,
) -> dict[str, object]:
    """What `config.json` says under `quantization_config`.

    For NF4 and FP4 it is `transformers.BitsAndBytesConfig(...).to_dict()`. For the others
    `quant_method` is `halfbyte`, which transformers refuses by name.

    Args:
        codebook: Of the 4-bit weights.
        block_size: Elements per scale; bitsandbytes reads it from the weights themselves.
        double_quant: Whether the scales are stored in 8 bits.
        compute_dtype: What the weights are dequantized to in a matmul.
        skip_modules: Linear modules left in 16 bits, where those are not just `lm_head`.
    """
    book = find_codebook(codebook)
    if book not in (NF4, FP4):
        return {
            "quant_method": "halfbyte",
            "codebook": book.name,
            "block_size": block_size,
            "double_quant": double_quant,
            "compute_dtype": dtype_name(compute_dtype),
            "skip_modules": None if skip_modules is None else list(skip_modules),
        }
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None if skip_modules is None else list(skip_modules),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": book.name,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
