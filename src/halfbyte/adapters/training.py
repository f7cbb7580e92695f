"""A new adapter on a decoder, ready to be trained, and back to a value that can be written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.initialize import new_factors
from halfbyte.adapters.spec import LoraShape, LoraSpec, resolve_targets
from halfbyte.models.decoder import Decoder

TRAINED = "trained"
"""Name of the adapter in the banks."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainableAdapter:
    """An adapter in the banks of a decoder whose factors require gradients.

    Attributes:
        spec: What it was made from.
        shapes: Rank and scaling by module path.
        parameters: `<path>.lora_A` and `<path>.lora_B`, float32 leaves, in the order of use.
    """

    spec: LoraSpec
    shapes: Mapping[str, LoraShape]
    parameters: dict[str, Tensor]

    def to_adapter(self, base_model: str, provenance: Mapping[str, object]) -> Adapter:
        """The factors as they are, without copies."""
        modules = {
            path: LoraUpdate(
                self.parameters[f"{path}.lora_A"].detach(),
                self.parameters[f"{path}.lora_B"].detach(),
                shape.alpha,
                shape.use_rslora,
            )
            for path, shape in self.shapes.items()
        }
        return Adapter(modules, base_model, self.spec.dropout, provenance)


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
        ConfigError: The spec does not fit the model's linear layers.
    """
    shapes = resolve_targets(spec, decoder.linears)
    parameters = {}
    for path, shape in shapes.items():
        linear = decoder.linears[path]
        features = (linear.out_features, linear.in_features)
        factors = new_factors(
            shape, features, path=path, seed=seed, init=spec.init, dropout=spec.dropout
        )
        linear.attach(TRAINED, factors)
        parameters[f"{path}.lora_A"] = factors.a_RI
        parameters[f"{path}.lora_B"] = factors.b_OR
    decoder.mixes = (tuple((name, 1.0) for name in (*below, TRAINED)),)
    return TrainableAdapter(spec, shapes, parameters)
