"""The configuration of a run: every setting, its default and what it means.

Those of `lora` are in `adapters/spec.py`.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from halfbyte.adapters.spec import LoraSpec

Method = Literal["qlora", "lora", "full"]
DataFormat = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "tokens"
]

ReportName = Literal["tensorboard", "wandb"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: object) -> object:
    """`"600MB"`, `"1.5 GiB"` or a plain number as bytes; anything else unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    number = text.rstrip("BIKMG ")
    unit = text[len(number) :].strip()
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f"a size such as 600MB or 2GiB expected, found {value!r}") from None


def _two_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"both at least 0 and below 1 expected, found {betas}")
    return betas


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and nothing changes once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataSection(Section):
    """What to train on."""

    train: str
    """A file, a folder or a glob."""
    eval: str | None = None
    """The same for evaluation; without it `eval_fraction` of the training data is held out."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the training data held out when `eval` is not given. Rows that share a prompt
    stay together. 0 trains on everything and evaluates nothing."""
    format: DataFormat = "auto"
    """How rows are read; `auto` detects it and says what it found."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens a row may have."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """What to do with longer rows: stop and name them, cut them, or leave them out."""
    train_on_prompt: bool = False
    """Whether the loss counts prompts and user turns as well."""
    group_by_length: bool = False
    """Whether documents of like length are trained together."""


class LoraSection(LoraSpec):
    """The adapter that is trained, and what lies below it."""

    on_top_of: str | None = None
    """An adapter or stack that stays frozen below the new one; the result is a stack."""


class TrainingSection(Section):
    """How to learn."""

    method: Method = "qlora"
    """`qlora` trains an adapter on a 4-bit base, `lora` on a 16-bit base, `full` all weights."""
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data, unless `max_steps` is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, however many epochs that makes."""
    tokens_per_step: Annotated[int, Field(ge=1)] = 4096
    """Tokens (trained on or not) of one optimizer step: the batch size."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that go through the model at once; by default 2048, or those of the longest document
    if it has more, but never more than the step's."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up; `linear` and `cosine` end at 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Part of all steps in which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices; vectors never decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm over all parameters; null never does."""
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """dtype of activations and matmuls. `fp16` uses dynamic loss scaling."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of initialisation, order of the data and dropout."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; by default at the end of each epoch. Always at the end."""
    eval_first: bool = False
    """Whether to evaluate before the first step, too."""
    num_samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that are continued at each evaluation, the most likely token each time;
    shown, and written to `samples.jsonl`."""
    sample_tokens: Annotated[int, Field(ge=1)] = 48
    """Tokens at most of each such text."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a better held-out loss."""
    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints; by default as often as evaluations, and always at the end."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept; older ones are deleted once a newer one is known to be valid."""
    on_nan: Literal["stop", "skip"] = "stop"
    """After a step whose loss or gradients are not finite (it is never applied): stop the run
    with a checkpoint, or leave the step out and go on."""


class OptimizerSection(Section):
    """How to step."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW with float32 or 8-bit state, resident or paged."""
    betas: Annotated[tuple[float, float], AfterValidator(_two_betas)] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    fast_bytes: Bytes | None = None
    """Memory for the state and the gradients of a paged optimizer, which needs it; the others
    take none. It is the most: less is used while the rest of the run needs the memory."""
    directory: str | None = None
    """Where a paged optimizer keeps what does not fit, on a disk; by default the run directory."""

    @property
    def paged(self) -> bool:
        """Whether it has a budget."""
        return self.name.startswith("paged_")

    @model_validator(mode="after")
    def _has_a_budget_if_it_needs_one(self) -> Self:
        if self.paged and self.fast_bytes is None:
            raise ValueError(f"{self.name} needs optimizer.fast_bytes, such as 256MB")
        if not self.paged and self.fast_bytes is not None:
            raise ValueError(f"{self.name} keeps all in memory; optimizer.fast_bytes is for paged_")
        return self


class MemorySection(Section):
    """What a run may use."""

    budget: Bytes | None = None
    """Most resident memory of the whole process, such as 2GB. The run is planned with a short
    probe and refused if it does not fit; without a budget, and unless `recompute` is
    `auto`, nothing is measured before the start."""
    recompute: Literal["none", "auto", "all"] = "none"
    """Which layers compute their activations again in the backward pass instead of keeping
    them: a third more arithmetic for a fraction of the memory. `auto` takes the fewest that fit
    `budget`, or without one the memory that is left."""


class OutputSection(Section):
    """What a run leaves."""

    dir: str
    """The run directory."""
    merge: Literal["none", "bf16", "nf4"] = "none"
    """Also write a standalone model, in `merged`: the base with the adapter added to it. With
    `nf4` its codes are chosen on the training data."""
    report_to: list[ReportName] = Field(default_factory=list)
    """Also report to TensorBoard (files in the run directory) or Weights & Biases (offline unless
    WANDB_MODE says otherwise). Both are optional packages; their failures never stop a run."""


class Config(Section):
    """A whole run."""

    model: str
    """A model directory; `halfbyte quantize` makes one of a hub id or a GGUF file."""
    data: DataSection
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    memory: MemorySection = Field(default_factory=MemorySection)
    output: OutputSection
