"""The table of commands: what `halfbyte --help` lists and where each one lives."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is imported when it is used.

    Attributes:
        module: Holds `app`, made by `parsing.new_app`.
        help: One line for `halfbyte --help`.
    """

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "halfbyte.cli.doctor", "Check this machine and say how to fix what is wrong."
    ),
    "quantize": Command(
        "halfbyte.cli.quantize", "Turn any model into a 4-bit model directory, in bounded memory."
    ),
    "inspect": Command(
        "halfbyte.cli.inspect", "Explain a model, adapter or run without loading it."
    ),
    "data": Command(
        "halfbyte.cli.data", "Check what a model will be trained on; show a row with its loss."
    ),
    "plan": Command(
        "halfbyte.cli.plan", "Predict memory, disk and time of a run before it starts."
    ),
    "train": Command("halfbyte.cli.train", "Fine-tune a model on a data file."),
    "resume": Command("halfbyte.cli.resume", "Continue a run where it stopped."),
    "stack": Command(
        "halfbyte.cli.stack", "Adapters trained on top of each other, as one artifact."
    ),
    "generate": Command("halfbyte.cli.generate", "Continue text with a model."),
    "chat": Command("halfbyte.cli.chat", "Talk to a model through its chat template."),
    "compose": Command("halfbyte.cli.compose", "Combine adapters into one, by an expression."),
    "merge": Command(
        "halfbyte.cli.merge", "Merge an adapter into its base, and measure what that changed."
    ),
    "unmerge": Command("halfbyte.cli.unmerge", "Restore the base of a merged model."),
    "demo": Command("halfbyte.cli.demo", "Quantize a real model, fine-tune it, show the effect."),
}
"""Name -> command, in the order of the help."""
