"""4-bit LoRA layers for any `nn.Module` that has `nn.Linear` layers.

Each targeted layer is replaced in place by one that keeps its weight frozen, in 4 bits unless told
otherwise, and adds a trainable low-rank update. The rest of the module is untouched, so a Hugging
Face model or a vision tower trains as it did before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from halfbyte.adapters.adapter import Adapter, LoraUpdate, check_adapter_fits
from halfbyte.adapters.initialize import new_factors
from halfbyte.adapters.peft_files import read_adapter, write_adapter
from halfbyte.adapters.spec import LoraShape, LoraSpec, resolve_targets
from halfbyte.errors import ConfigError
from halfbyte.formats.quantized_tensor import quantize
from halfbyte.layers.linear import Linear, project
from halfbyte.layers.lora import LoraFactors, Route, Routing
from halfbyte.layers.weights import ResidentStore, Weight, WeightRef, as_tensor

_ADAPTER = "adapter"


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update; takes the place of an `nn.Linear`.

    Matmuls run in the dtype of the input, or in that of `torch.autocast` where it is on. The
    frozen weight is no parameter and not in the state dict: that holds `lora_A` and `lora_B`.

    Attributes:
        lora_A: float32 `[R, I]`.
        lora_B: float32 `[O, R]`.
    """

    def __init__(
        self, path: str, weight: Weight, bias: Tensor | None, factors: LoraFactors
    ) -> None:
        super().__init__()
        self._path = path
        self._weight = weight
        self._bias = bias
        self.lora_A = nn.Parameter(factors.a_RI.detach())
        self.lora_B = nn.Parameter(factors.b_OR.detach())
        self._scaling = factors.scaling
        self._dropout = factors.dropout
        self._linear = self._build()

    def _build(self) -> Linear:
        weights: dict[str, Weight] = {"weight": self._weight}
        bias = None
        if self._bias is not None:
            weights["bias"] = self._bias
            bias = WeightRef("bias", tuple(self._bias.shape))
        weight = WeightRef("weight", tuple(self._weight.shape))
        linear = Linear(self._path, weight, bias, ResidentStore(weights))
        linear.attach(
            _ADAPTER, LoraFactors(self.lora_A, self.lora_B, self._scaling, dropout=self._dropout)
        )
        return linear

    @property
    def weight(self) -> Weight:
        """The frozen weight, `[O, I]`."""
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` -> `[..., O]`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x_TI = x.reshape(-1, x.shape[-1])
        seed = None
        if self.training and self._dropout:  # drawn from PyTorch's generator, so checkpointing
            seed = int(torch.randint(2**62, ()))  # that restores it sees the same mask again
        num_tokens = x_TI.shape[0]
        routes = (Route(0, num_tokens, ((_ADAPTER, 1.0),)),) if num_tokens else ()
        (y_TO,) = project(x_TI, (self._linear,), Routing(routes, num_tokens, seed))
        return y_TO.view(*x.shape[:-1], self._linear.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for factor in (self.lora_A, self.lora_B):
            factor.data = factor.data.float()  # `module.bfloat16()` is meant for the rest
        device = fn(torch.empty(0)).device
        self._weight = self._weight.to(device)
        self._bias = None if self._bias is None else self._bias.to(device)
        self._linear = self._build()
        return self

    def extra_repr(self) -> str:
        """Shape, rank and storage."""
        outputs, inputs = self._weight.shape
        bits = "16-bit" if isinstance(self._weight, Tensor) else self._weight.codebook.name
        return f"in={inputs}, out={outputs}, rank={self.lora_A.shape[0]}, weight={bits}"


@dataclass(frozen=True, slots=True, eq=False)
class AttachedAdapter:
    """The adapted layers of a module.

    Attributes:
        spec: What was attached.
        shapes: Rank and scaling by module path.
        layers: The layers by module path.
        linears: Paths of all linear layers there were to choose from.
    """

    spec: LoraSpec
    shapes: Mapping[str, LoraShape]
    layers: Mapping[str, AdaptedLinear]
    linears: tuple[str, ...]

    def parameters(self) -> list[nn.Parameter]:
        """What to give to an optimizer."""
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    @property
    def num_parameters(self) -> int:
        """Trainable elements."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, directory: str | Path, *, base_model: str = "", replace: bool = False) -> None:
        """Write an adapter directory that PEFT loads.

        Raises:
            StorageError: It exists, or writing failed.
        """
        modules = {
            path: LoraUpdate(
                layer.lora_A.detach().cpu(),
                layer.lora_B.detach().cpu(),
                self.shapes[path].alpha,
                self.shapes[path].use_rslora,
            )
            for path, layer in self.layers.items()
        }
        adapter = Adapter(modules, base_model, self.spec.dropout)
        write_adapter(adapter, directory, linears=self.linears, replace=replace)

    def load(self, directory: str | Path) -> None:
        """Take over the factors of an adapter directory of the same layers, ranks and alphas.

        Raises:
            FormatError: It is damaged or does not fit; lists everything.
        """
        adapter = read_adapter(directory)
        features = {path: tuple(layer.weight.shape) for path, layer in self.layers.items()}
        check_adapter_fits(adapter, features, name=str(directory))  # type: ignore[arg-type]
        problems = [
            f"{path}: {_summary(shape)} expected, found {found}"
            for path, shape in self.shapes.items()
            if (found := _summary(adapter.modules.get(path))) != _summary(shape)
        ]
        if problems:
            raise ConfigError(f"{directory}: not the adapter that is attached", problems=problems)
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.lora_A.copy_(adapter.modules[path].a_RI)
                layer.lora_B.copy_(adapter.modules[path].b_OR)


def attach(
    module: nn.Module,
    spec: LoraSpec | Mapping[str, object] | None = None,
    *,
    codebook: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    seed: int = 0,
) -> AttachedAdapter:
    """Replace linear layers by 4-bit LoRA layers, in place, and freeze everything else.

    Args:
        module: Has `nn.Linear` layers. A language model's output embedding is not one of them.
        spec: Which layers, which rank; a `LoraSpec` or its settings.
        codebook: Of the frozen weights; None leaves them in their dtype.
        block_size: Of the frozen weights.
        double_quant: Store their scales in 8 bits.
        seed: Of the initial factors.

    Returns:
        The new layers: their parameters, and saving and loading as a PEFT adapter.

    Raises:
        ConfigError: The spec matches nothing, or names what is not there.
        FormatError: A weight holds a NaN or an infinity. Nothing is replaced then.
    """
    spec = spec if isinstance(spec, LoraSpec) else LoraSpec.model_validate(spec or {})
    _require_simple_init(spec, codebook)
    linears = _linears(module)
    shapes = resolve_targets(spec, linears)
    layers = {}
    for path, shape in shapes.items():
        linear = linears[path]
        features = (linear.out_features, linear.in_features)
        dense = linear.weight.detach()
        weight: Weight = (
            dense
            if codebook is None
            else quantize(
                dense, codebook, block_size=block_size, double_quant=double_quant, name=path
            )
        )
        factors = new_factors(
            shape,
            features,
            path=path,
            seed=seed,
            init=spec.init,
            dropout=spec.dropout,
            matrix_OI=dense - as_tensor(weight, dense.dtype) if spec.init == "loftq" else None,
        )
        bias = None if linear.bias is None else linear.bias.detach()
        layers[path] = AdaptedLinear(path, weight, bias, factors).to(linear.weight.device)
    module.requires_grad_(requires_grad=False)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.train(module.training))
    return AttachedAdapter(spec, shapes, layers, tuple(linears))


def _require_simple_init(spec: LoraSpec, codebook: str | None) -> None:
    if spec.init == "pissa":
        raise ConfigError(
            "lora.init pissa: a layer of `attach` has one adapter, and pissa needs a second one to "
            "subtract",
            hint="`halfbyte.train` can; here there are default, gaussian and loftq.",
        )
    if spec.init == "loftq" and codebook is None:
        raise ConfigError("lora.init loftq: without a codebook there is no quantization error")
    if spec.init_weights is not None:
        raise ConfigError("lora.init_weights: `attach` has the weights; expected none")


def _summary(update: LoraShape | LoraUpdate | None) -> str:
    return "none" if update is None else f"rank {update.rank} and scaling {update.scaling:g}"


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    output = getattr(module, "get_output_embeddings", lambda: None)()
    found = {
        name: part
        for name, part in module.named_modules()
        if name and isinstance(part, nn.Linear) and part is not output
    }
    if not found:
        raise ConfigError(f"{type(module).__name__} has no nn.Linear layers to adapt")
    return found
