"""What the config leaves open, decided before the first step."""

import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels.backends import cpu_isa
from halfbyte.training.choices import Choices
from halfbyte.training.config import Config
from halfbyte.training.methods import TrainedModel
from halfbyte.training.run_data import RunData

DEFAULT_MICRO_BATCH_TOKENS = 2048


def choose(config: Config, model: TrainedModel, data: RunData) -> Choices:
    """Fix what the config leaves open.

    Raises:
        ConfigError: A document is longer than the budgets.
    """
    training = config.training
    origin, longest = data.train.longest()
    wanted = training.micro_batch_tokens or min(
        training.tokens_per_step, max(DEFAULT_MICRO_BATCH_TOKENS, longest)
    )
    if longest > min(wanted, training.tokens_per_step):
        raise ConfigError(
            f"{origin}: {longest} tokens do not fit training.micro_batch_tokens = {wanted} and "
            f"training.tokens_per_step = {training.tokens_per_step}",
            hint="Raise them, or lower data.max_length.",
        )
    num_layers = len(model.decoder.layers)
    return Choices(
        micro_batch_tokens=wanted,
        recompute=num_layers if config.memory.recompute == "all" else 0,
        num_threads=torch.get_num_threads(),
        kernels=cpu_isa(),
    )
