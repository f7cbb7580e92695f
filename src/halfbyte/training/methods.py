"""What is trained: an adapter on a 4-bit base, an adapter on a 16-bit base, or all weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.adapters.attaching import attach_adapter
from halfbyte.adapters.spec import resolve_targets
from halfbyte.adapters.stack import Stack
from halfbyte.adapters.stack_files import load_parts
from halfbyte.adapters.training import TrainableAdapter, attach_new_adapter
from halfbyte.errors import ConfigError
from halfbyte.formats.quantized_tensor import QuantizedTensor
from halfbyte.models.decoder import Decoder
from halfbyte.models.layout import layout_of
from halfbyte.models.load import load_decoder
from halfbyte.models.record import recorded_fingerprint
from halfbyte.models.trainable_store import TrainableStore
from halfbyte.training.config import Config

BELOW = "below"
"""Name of the frozen adapter in the banks."""

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A decoder and the part of it that is trained.

    Attributes:
        decoder: Runs with what is trained.
        parameters: What is trained, float32, by name.
        adapter: The adapter; None for the method `full`.
        store: All weights, for the method `full`; else None.
        below: Frozen adapters that the trained one stands on; None for the base alone.
    """

    decoder: Decoder
    parameters: dict[str, Tensor]
    adapter: TrainableAdapter | None
    store: TrainableStore | None
    below: Stack | None = None

    @property
    def stand_ins(self) -> dict[Tensor, Tensor]:
        """What autograd sees in the place of some parameters."""
        return {} if self.store is None else self.store.stand_ins

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what is trained, and what is subtracted from it."""
        return self.parameters | ({} if self.adapter is None else self.adapter.subtracted)

    def refresh(self) -> None:
        """Let the decoder see what changed in the parameters."""
        if self.store is not None:
            self.store.refresh()


def open_base(config: Config) -> Decoder:
    """Open the base of a run, mapped, and check that what the run trains fits it.

    Raises:
        ConfigError: The model's storage does not fit the method, or `lora` not the model.
        MissingFileError: There is no such model.
        FormatError: The model directory is damaged.
    """
    compute_dtype = COMPUTE_DTYPES[config.training.compute_dtype]
    decoder = load_decoder(Path(config.model), compute_dtype=compute_dtype)
    _require_storage(decoder, config)
    if config.training.method != "full":
        resolve_targets(config.lora, decoder.linears)
    return decoder


def attach_trained(base: Decoder, config: Config) -> TrainedModel:
    """Make what the method trains. From here on memory is taken: `full` copies all weights.

    Raises:
        MissingFileError: There is no such adapter below.
        FormatError: The adapter below is damaged or does not fit.
        VerificationError: The adapter below was trained on another base.
    """
    if config.training.method == "full":
        weights = {ref.name: base.store.acquire(ref) for ref in layout_of(base.config).refs()}
        store = TrainableStore(weights, base.compute_dtype)
        trained = Decoder(base.config, store, compute_dtype=base.compute_dtype)
        return TrainedModel(trained, store.masters, None, store)
    below = _attach_below(base, config)
    adapter = attach_new_adapter(
        base, config.lora, config.training.seed, below=() if below is None else (BELOW,)
    )
    return TrainedModel(base, adapter.parameters, adapter, None, below)


def _attach_below(decoder: Decoder, config: Config) -> Stack | None:
    source = config.lora.on_top_of
    if source is None:
        return None
    below = Stack(load_parts(source))
    base = recorded_fingerprint(Path(config.model))
    attach_adapter(decoder, BELOW, below.flatten(), base=base, source=source)
    return below


def _require_storage(decoder: Decoder, config: Config) -> None:
    in_4_bits = any(
        isinstance(decoder.store.acquire(linear.weight), QuantizedTensor)
        for linear in decoder.linears.values()
    )
    method = config.training.method
    if method == "full" and config.lora.on_top_of is not None:
        raise ConfigError(
            "training.method full trains the weights themselves: lora.on_top_of has no place there",
            hint="Merge the adapter into the base first, or train an adapter.",
        )
    if method == "qlora" and not in_4_bits:
        raise ConfigError(
            f"training.method qlora needs a 4-bit base; {config.model} is not quantized",
            hint=f"Quantize it once: halfbyte quantize {config.model} {config.model}-nf4",
        )
    if method != "qlora" and in_4_bits:
        raise ConfigError(
            f"training.method {method} needs weights of 16 bits or more; {config.model} has 4",
            hint="Name the model it was quantized from, or use training.method=qlora.",
        )
