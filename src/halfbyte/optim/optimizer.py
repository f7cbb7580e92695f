"""A `torch.optim.Optimizer` made of three parts: a rule, a format of state, and a store.

`step` applies whole or not at all: everything that can be refused is refused before the first
element changes. The one exception is a step that is broken off from outside, or by a page that
cannot be read back; then parameters and state do not belong together, and both further steps and
saving are refused.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from halfbyte.errors import FormatError, StorageError, UnsupportedError, UsageError
from halfbyte.formats.checks import FLOAT_DTYPES, describe
from halfbyte.kernels import activations
from halfbyte.memory.layout import Field, Item
from halfbyte.memory.pool import Pool
from halfbyte.memory.stats import PoolStats
from halfbyte.memory.walks import Chunk
from halfbyte.optim.accumulators import Accumulator, PagedAccumulator, ResidentAccumulator
from halfbyte.optim.export import STEP, StateTensors, check_state, split_name
from halfbyte.optim.paging import Paging
from halfbyte.optim.rules import Rule, Scalars
from halfbyte.optim.state import StateFormat, state_format
from halfbyte.optim.stores import ResidentStore

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""What PyTorch's optimizers take: parameters, groups, or named parameters."""


# As PyTorch wraps it, the first call imports its compiler, only to keep it out: 72 MB of memory.
_add_param_group = getattr(
    torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group
)


@dataclass(frozen=True, slots=True)
class _Work:
    """One parameter in one step; its gradient is None when it is in pages."""

    param: Tensor
    grad: Tensor | None
    form: StateFormat
    scalars: Scalars


class StatefulOptimizer(torch.optim.Optimizer):
    """The common part of this package's optimizers.

    Raises:
        UsageError: A setting is out of its range, or there is no parameter.
        UnsupportedError: A parameter is sparse, complex, not contiguous, or on another device.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        rule: Rule,
        state_bits: int,
        paging: Paging | None,
    ) -> None:
        if state_bits not in {8, 32}:
            raise UsageError(f"state_bits: 8 or 32 expected, found {state_bits}")
        self._rule = rule
        self._state_bits = state_bits
        self._paging = paging
        self._numbers: dict[Tensor, int] = {}  # parameter -> its item in the store
        self._formats: dict[int, StateFormat] = {}
        self._under_way = False
        self._accumulator: PagedAccumulator | None = None
        super().__init__(params, defaults)
        device = self.param_groups[0]["params"][0].device
        self._store: Pool | ResidentStore = (
            ResidentStore(device) if paging is None else paging.pool(device)
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's; settings and parameters are checked."""
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            _require_settings(group)
            self._check_params(group["params"])
        except (UsageError, UnsupportedError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the gradients. Parameters without one keep their value and their state.

        Gradients in pages are used up: they are gone afterwards, as after `zero_grad`.

        Raises:
            StorageError: Paging failed. Nothing was applied, unless the message says that a page
                was lost.
            UnsupportedError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_whole()
        work = self._gather()
        if not work:
            return loss
        self._store.require_usable()
        for chunk in self._store.walk(work.keys(), spend=True):
            self._under_way = True
            self._apply(work[chunk.item], chunk)
        for one in work.values():
            self.state[one.param][STEP] += 1
        # Our operators write without autograd's knowledge; copies in other dtypes ask it.
        torch.autograd.graph.increment_version([one.param for one in work.values()])
        if self._accumulator is not None:
            self._accumulator.begin()
        self._under_way = False
        return loss

    def stats(self) -> PoolStats:
        """Where the state is and what was moved, since the beginning."""
        return self._store.stats()

    @property
    def paged(self) -> bool:
        """Whether state has a budget, and gradients can share it."""
        return isinstance(self._store, Pool)

    @property
    def state_bytes(self) -> int:
        """Bytes of all state, without padding."""
        return sum(self._store.items[number].num_bytes for number in self._numbers.values())

    # The budget of paged state

    def set_fast_bytes(self, fast_bytes: int) -> None:
        """Change the budget of paged state, at any time and from any thread.

        Raises:
            UsageError: The state is not paged, or the budget has no room for two pages.
            StorageError: The slow tier cannot take what must leave.
        """
        self._require_pool().set_budget(fast_bytes)

    def make_room(self, num_bytes: int) -> int:
        """Shrink the budget so that the rest of the run can take `num_bytes`; let it grow back.

        Called before each large allocation, it is the budget that adapts: as much of the
        `fast_bytes` first given as the machine, and the limits on this process, leave over.

        Returns:
            The budget.

        Raises:
            UsageError: The state is not paged.
            StorageError: The slow tier cannot take what must leave.
        """
        pool = self._require_pool()
        assert self._paging is not None  # noqa: S101  (there is a pool)
        return pool.make_room(num_bytes, most=self._paging.fast_bytes)

    @property
    def resident_bytes(self) -> int:
        """Fast memory that state, and gradients in pages, take at this moment."""
        if isinstance(self._store, Pool):
            return self._store.resident_bytes
        return self.state_bytes

    def prefetch(self) -> None:
        """Begin to bring in what the next step needs first; worth doing during the backward."""
        if isinstance(self._store, Pool):
            self._store.prefetch()

    def require_usable(self) -> None:
        """Raise what keeps the next step from being taken.

        Raises:
            StorageError: Paging failed during the last step, or the step was broken off.
        """
        self._require_whole()
        self._store.require_usable()

    # Gradients

    def accumulator(self, leaves: Mapping[Tensor, Tensor] | None = None) -> Accumulator:
        """Where gradients add up from here on: with paged state in its pages, else in `.grad`.

        In pages they share the budget with the state, and `.grad` is None after a backward
        pass: clip with `finish` of what this returns.

        Args:
            leaves: What autograd sees in the place of some parameters; see `PagedAccumulator`.

        Raises:
            StorageError: The slow tier has no room for them.
        """
        params = [param for _, param in self._named()]
        if not isinstance(self._store, Pool):
            return ResidentAccumulator(params)
        if self._accumulator is None:
            items = [
                Item(
                    f"gradient of {name}",
                    param.numel(),
                    (Field("gradient", param.dtype),),
                    cut=Item("", 0, self._format(param).fields).granule,
                )
                for name, param in self._named()
            ]
            numbers = dict(zip(params, self._store.add(items), strict=True))
            self._accumulator = PagedAccumulator(self._store, numbers, leaves)
            self._pair(list(self._numbers))
        return self._accumulator

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  (PyTorch's)
        """As PyTorch's; gradients in pages are forgotten as well."""
        super().zero_grad(set_to_none)
        if self._accumulator is not None:
            self._accumulator.begin()

    def _pair(self, params: list[Tensor]) -> None:
        """Let steps find the gradients of these parameters beside their state."""
        if self._accumulator is not None and isinstance(self._store, Pool):
            found = ((self._accumulator.item(param), self._numbers[param]) for param in params)
            self._store.pair((item, state) for item, state in found if item is not None)

    def _require_pool(self) -> Pool:
        if isinstance(self._store, Pool):
            return self._store
        raise UsageError(
            f"{type(self).__name__} keeps all state resident: there is no budget to change",
            hint="Use a paged optimizer, such as PagedAdamW.",
        )

    # State out and in

    def state_tensors(self) -> StateTensors:
        """All state by name, for a checkpoint: `NAME.exp_avg`, ..., `NAME.step`.

        A parameter's name is the one it was passed with, else its number. Tensors are read when
        they are asked for, so that saving paged state needs the memory of one.

        Raises:
            StorageError: The last step was broken off, or a page was lost.
        """
        self._require_whole()
        return StateTensors(
            self._store,
            {
                name: (self._numbers[param], param.shape, self.state[param][STEP])
                for name, param in self._named()
                if self.state.get(param)
            },
        )

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state that `state_tensors` gave; settings of the groups stay as they are.

        Parameters without state in `tensors` start anew.

        Raises:
            FormatError: Names, shapes or dtypes do not fit; all problems are listed, and nothing
                was changed.
            StorageError: Paging failed.
        """
        found: dict[Tensor, dict[str, Tensor]] = {}
        problems = []
        named = dict(self._named())
        for key in tensors:
            name, field = split_name(key)
            if name in named:
                found.setdefault(named[name], {})[field] = tensors[key]
            else:
                problems.append(f"{key}: no parameter is called {name!r}")
        self._require_fitting(found, problems)
        self._install(found)

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's. Paged state is read into memory whole: prefer `state_tensors`.

        With float32 state, `torch.optim` loads it, and the other way round.
        """
        self._require_whole()
        packed = super().state_dict()
        numbers = {param: n for n, (_, param) in enumerate(self._in_order())}
        for param, item in self._numbers.items():
            if self.state.get(param):
                values = self._fields(param, item)
                packed["state"][numbers[param]] = {**packed["state"][numbers[param]], **values}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, except that nothing is cast to the dtype of a parameter.

        Raises:
            FormatError: The state does not fit; all problems are listed, and nothing was changed.
            ValueError: The groups do not fit.
        """
        order = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [param for _, param in self._in_order()]
        saved: dict[Any, dict[str, Any]] = state_dict["state"]
        problems = [f"{n!r}: no group has such a parameter" for n in saved if n not in order]
        for group in state_dict["param_groups"]:
            problems += _setting_problems(group)
        found = {
            param: {key: torch.as_tensor(value) for key, value in saved[number].items()}
            for number, param in zip(order, params, strict=False)
            if number in saved
        }
        self._require_fitting(found, problems)
        states = self.state
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = states
        self._install(found)

    def _require_fitting(
        self, found: Mapping[Tensor, Mapping[str, Tensor]], problems: list[str]
    ) -> None:
        names = {param: name for name, param in self._named()}
        for param, fields in found.items():
            problems += check_state(names[param], param.shape, self._format(param).fields, fields)
        if problems:
            raise FormatError("optimizer state does not fit the optimizer", problems=problems)

    def _install(self, found: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Make the states of all parameters those that were found, or new."""
        self._create([param for param in found if param not in self._numbers])
        self._under_way = True  # until all are of one step again
        for param, item in self._numbers.items():
            if param in found:
                fields = self._formats[item].fields
                self._store.write(item, [found[param][field.name] for field in fields])
                self._begin(param, item)
                self.state[param][STEP].copy_(found[param][STEP].reshape(()))
            elif self.state.pop(param, None):
                self._store.write(item, [torch.zeros_like(v) for v in self._store.read(item)])
        self._under_way = False

    # One step

    def _gather(self) -> dict[int, _Work]:
        """What the step will do, with new state made for what has none."""
        pending = []
        for group in self.param_groups:
            for param in group["params"]:
                if self._accumulator is not None and self._accumulator.item(param) is not None:
                    self._accumulator.take(param)  # one that was put there by hand
                    if self._accumulator.has(param):
                        pending.append((group, param))
                elif param.grad is not None:
                    pending.append((group, param))
        if sparse := [p for _, p in pending if p.grad is not None and p.grad.is_sparse]:
            raise UnsupportedError(
                f"{len(sparse)} gradients are sparse, dense ones expected",
                hint="torch.optim.SparseAdam takes sparse gradients.",
            )
        self._create([p for _, p in pending if p not in self._numbers])
        work = {}
        for group, param in pending:
            item = self._numbers[param]
            state = self.state[param]
            if STEP not in state:
                self._begin(param, item)
            scalars = self._rule.scalars(group, int(state[STEP].item()) + 1)
            grad = None if param.grad is None else param.grad.contiguous()
            work[item] = _Work(param, grad, self._formats[item], scalars)
        return work

    def _apply(self, one: _Work, chunk: Chunk) -> None:
        part = slice(chunk.begin, chunk.end)
        param = one.param.view(-1)[part]
        if one.grad is not None:
            grad = one.grad.view(-1)[part]
        else:
            assert self._accumulator is not None  # noqa: S101  (what `_gather` found)
            grad = self._accumulator.scaled(chunk.beside[0])
        work = param.float()  # the parameter itself when it is float32
        one.form.update(work, grad.float(), chunk.values, one.scalars)
        if work is not param:
            param.copy_(work)

    def _create(self, params: list[Tensor]) -> None:
        """Make room for the state of parameters that have none."""
        if not params:
            return
        activations.release()  # state comes to stay, and nothing is kept beside it
        names = {param: name for name, param in self._named()}
        formats = [self._format(param) for param in params]
        items = [
            Item(names[param], param.numel(), form.fields)
            for param, form in zip(params, formats, strict=True)
        ]
        for param, form, number in zip(params, formats, self._store.add(items), strict=True):
            self._numbers[param] = number
            self._formats[number] = form
            self._begin(param, number)
        self._pair(params)

    def _begin(self, param: Tensor, item: int) -> None:
        self.state[param][STEP] = torch.zeros((), dtype=torch.float32)
        if isinstance(self._store, ResidentStore):
            self.state[param].update(self._fields(param, item))

    def _fields(self, param: Tensor, item: int) -> dict[str, Tensor]:
        """The state of a parameter; what has a value an element has the parameter's shape."""
        fields = self._formats[item].fields
        return {
            field.name: value.view(param.shape) if field.elements == 1 else value
            for field, value in zip(fields, self._store.read(item), strict=True)
        }

    def _format(self, param: Tensor) -> StateFormat:
        return state_format(self._rule, bits=self._state_bits, num_elements=param.numel())

    def _require_whole(self) -> None:
        if self._under_way:
            raise StorageError(
                "a step was broken off half-way: parameters and state do not belong together",
                hint="Load both from the last checkpoint.",
            )

    def _in_order(self) -> list[tuple[str | None, Tensor]]:
        found: list[tuple[str | None, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            found += zip(names, group["params"], strict=True)
        return found

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            (str(number) if name is None else name, param)
            for number, (name, param) in enumerate(self._in_order())
        ]

    def _check_params(self, params: list[Tensor]) -> None:
        device = self.param_groups[0]["params"][0].device
        problems = []
        for param in params:
            faults = []
            if param.dtype not in FLOAT_DTYPES:
                faults.append("float32, bfloat16 or float16 expected")
            if param.layout != torch.strided or not param.is_contiguous():
                faults.append("a contiguous tensor expected")
            if param.device != device:
                faults.append(f"{device} expected, as the first parameter, found {param.device}")
            problems += [f"{describe(param)}: {fault}" for fault in faults]
        if problems:
            raise UnsupportedError("parameters that cannot be optimized here", problems=problems)


_RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, float("inf")),
    "eps": (0.0, float("inf")),
    "weight_decay": (0.0, float("inf")),
    "momentum": (0.0, 1.0),
}


_ABSENT = ("amsgrad", "maximize", "nesterov", "dampening", "differentiable", "capturable")
"""Settings of PyTorch's optimizers that would be ignored here."""


def _setting_problems(group: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, (low, high) in _RANGES.items():
        if name in group and not low <= float(group[name]) < high:
            problems.append(
                f"{name}: at least {low} and below {high} expected, found {group[name]}"
            )
    problems += [
        f"betas: at least 0 and below 1 expected, found {beta}"
        for beta in group.get("betas", ())
        if not 0.0 <= float(beta) < 1.0
    ]
    problems += [f"{name}: not supported here" for name in _ABSENT if group.get(name)]
    return problems


def _require_settings(group: Mapping[str, Any]) -> None:
    if problems := _setting_problems(group):
        raise UsageError("optimizer settings out of range", problems=problems)
