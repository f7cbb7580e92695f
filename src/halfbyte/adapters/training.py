"""A new adapter on a decoder, ready to be trained, and back to a value that can be written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.initial_matrices import InitialMatrices
from halfbyte.adapters.initialize import new_factors
from halfbyte.adapters.spec import LoraShape, LoraSpec, resolve_targets
from halfbyte.layers.lora import LoraFactors
from halfbyte.models.decoder import Decoder

TRAINED = "trained"
"""Name of the adapter in the banks."""

INITIAL = "initial"
"""Name in the banks of what an adapter began as, where that is subtracted."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainableAdapter:
    """An adapter in the banks of a decoder whose factors require gradients.

    Attributes:
        spec: What it was made from.
        shapes: Rank and scaling by module path.
        parameters: `<path>.lora_A` and `<path>.lora_B`, float32 leaves, in the order of use.
        subtracted: For `pissa`, the factors as they began, `<path>.initial_A` and `_B`, whose
            product is taken away from that of the parameters; empty otherwise.
    """

    spec: LoraSpec
    shapes: Mapping[str, LoraShape]
    parameters: dict[str, Tensor]
    subtracted: dict[str, Tensor]

    def to_adapter(self, base_model: str, provenance: Mapping[str, object]) -> Adapter:
        """What the base is changed by: the factors as they are, without copies.

        Where initial factors are subtracted, those join them, in twice the rank.
        """
        modules = {path: self._update(path, shape) for path, shape in self.shapes.items()}
        return Adapter(modules, base_model, self.spec.dropout, provenance)

    def _update(self, path: str, shape: LoraShape) -> LoraUpdate:
        a_RI = self.parameters[f"{path}.lora_A"].detach()
        b_OR = self.parameters[f"{path}.lora_B"].detach()
        if not self.subtracted:
            return LoraUpdate(a_RI, b_OR, shape.alpha, shape.use_rslora)
        # s (B A - B0 A0) = s [B, -B0] [A; A0], and alpha grows so that s stays.
        a_RI = torch.cat([a_RI, self.subtracted[f"{path}.initial_A"]])
        b_OR = torch.cat([b_OR, -self.subtracted[f"{path}.initial_B"]], dim=1)
        growth = math.sqrt(2) if shape.use_rslora else 2
        return LoraUpdate(a_RI, b_OR, shape.alpha * growth, shape.use_rslora)


def attach_new_adapter(
    decoder: Decoder, spec: LoraSpec, seed: int, *, below: Sequence[str] = ()
) -> TrainableAdapter:
    """Attach an adapter that changes nothing yet, and route every token through it.

    Args:
        decoder: The base.
        spec: Which layers, which rank.
        seed: Of the run.
        below: Adapters in the banks that tokens go through as well.

    Raises:
        ConfigError: The spec does not fit the model's linear layers, or its `init_weights` are not
            what the base was quantized from.
        MissingFileError, FormatError: There are no such weights, or they are damaged.
    """
    shapes = resolve_targets(spec, decoder.linears)
    matrices = InitialMatrices.open(spec, [decoder.linears[path] for path in shapes])
    parameters, subtracted = {}, {}
    for path, shape in shapes.items():
        linear = decoder.linears[path]
        features = (linear.out_features, linear.in_features)
        factors = new_factors(
            shape,
            features,
            path=path,
            seed=seed,
            init=spec.init,
            dropout=spec.dropout,
            matrix_OI=matrices.of(linear),
        )
        linear.attach(TRAINED, factors)
        if spec.init == "pissa":
            initial = LoraFactors(
                factors.a_RI.detach().clone(), factors.b_OR.detach().clone(), shape.scaling
            )
            linear.attach(INITIAL, initial)
            subtracted[f"{path}.initial_A"] = initial.a_RI
            subtracted[f"{path}.initial_B"] = initial.b_OR
        parameters[f"{path}.lora_A"] = factors.a_RI
        parameters[f"{path}.lora_B"] = factors.b_OR
    matrices.require_originals()
    mix = [(name, 1.0) for name in (*below, TRAINED)]
    decoder.mixes = ((*mix, (INITIAL, -1.0)) if subtracted else tuple(mix),)
    return TrainableAdapter(spec, shapes, parameters, subtracted)
