"""What the config leaves open, decided before the first step."""

from pathlib import Path

import torch

from halfbyte.errors import ConfigError, DoesNotFitError
from halfbyte.kernels.backends import cpu_isa
from halfbyte.models.decoder import Decoder
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.choices import Choices
from halfbyte.training.config import Config
from halfbyte.training.disk import disk_need, require_disk
from halfbyte.training.methods import open_base
from halfbyte.training.plan import Plan
from halfbyte.training.planning import Planner
from halfbyte.training.run_data import RunData, open_run_data

DEFAULT_MICRO_BATCH_TOKENS = 2048


def choose(config: Config, base: Decoder, data: RunData) -> tuple[Choices, Plan | None]:
    """Fix what the config leaves open, and plan the memory where the config asks for it.

    Nothing is measured unless there is a `memory.budget`, or `memory.recompute` is `auto`.

    Args:
        config: Of the run.
        base: Opened, and nothing attached yet.
        data: Of the run.

    Raises:
        ConfigError: A document is longer than the budgets.
        DoesNotFitError: Memory or disk are not enough.
    """
    micro_batch_tokens = resolve_micro_batch(config, data)
    require_disk(disk_need(config, base), Path(config.output.dir))
    plan = None
    recompute = len(base.layers) if config.memory.recompute == "all" else 0
    if config.memory.budget is not None or config.memory.recompute == "auto":
        planner = Planner(config, base, data, micro_batch_tokens)
        plan = choose_plan(config, planner)
        if not plan.fits:
            raise planner.refuse(plan)
        recompute = plan.recompute
    choices = Choices(
        micro_batch_tokens=micro_batch_tokens,
        recompute=recompute,
        num_threads=torch.get_num_threads(),
        kernels=cpu_isa(),
    )
    return choices, plan


def choose_plan(config: Config, planner: Planner) -> Plan:
    """The plan for the recomputation that the config asks for; `auto` takes the least that fits."""
    match config.memory.recompute:
        case "none":
            return planner.plan(0)
        case "all":
            return planner.plan(planner.memory.num_layers)
        case "auto":
            fewest = planner.fewest_recomputed()
            return planner.plan(planner.memory.most_recomputed if fewest is None else fewest)


def micro_batch_tokens(config: Config, longest: int) -> int:
    """The setting, or its default for data whose longest document has so many tokens."""
    training = config.training
    most = max(DEFAULT_MICRO_BATCH_TOKENS, longest)
    return training.micro_batch_tokens or min(training.tokens_per_step, most)


def resolve_micro_batch(config: Config, data: RunData) -> int:
    """Tokens of a micro-batch: the setting, or its default.

    Raises:
        ConfigError: A document is longer than the budgets.
    """
    training = config.training
    origin, longest = data.train.longest()
    wanted = micro_batch_tokens(config, longest)
    if longest > min(wanted, training.tokens_per_step):
        raise ConfigError(
            f"{origin}: {longest} tokens do not fit training.micro_batch_tokens = {wanted} and "
            f"training.tokens_per_step = {training.tokens_per_step}",
            hint="Raise them, or lower data.max_length.",
        )
    return wanted


def plan_run(config: Config) -> tuple[Plan, DoesNotFitError | None]:
    """Plan a run without starting it.

    Returns:
        The plan, and when it does not fit, why and what would.

    Raises:
        ConfigError, DataError, FormatError, MissingFileError: As starting it would.
        DoesNotFitError: Not even a few small steps fit.
    """
    base = open_base(config)
    data = open_run_data(config, Tokenizer.load(config.model))
    planner = Planner(config, base, data, resolve_micro_batch(config, data))
    plan = choose_plan(config, planner)
    if plan.peak_bytes > plan.limit_bytes:
        return plan, planner.refuse(plan)
    try:
        require_disk(plan.disk, Path(config.output.dir))
    except DoesNotFitError as error:
        return plan, error
    return plan, None
