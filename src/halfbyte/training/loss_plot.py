"""The loss of a run as a picture."""

from pathlib import Path

from halfbyte.training.metrics import read_records


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and held-out loss over the steps of a `metrics.jsonl`.

    Args:
        metrics: The file of records.
        picture: PNG or SVG, by its suffix.
    """
    # matplotlib takes a second to import, and only the end of a run needs it.
    from matplotlib.figure import Figure  # noqa: PLC0415

    trained: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    for record in read_records(metrics):
        step, loss, held_out_loss = (record.get(key) for key in ("step", "loss", "eval_loss"))
        if isinstance(step, int) and isinstance(loss, float):
            trained.append((step, loss))
        if isinstance(step, int) and isinstance(held_out_loss, float):
            held_out.append((step, held_out_loss))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
        axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target token (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    if trained or held_out:
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average over about a twentieth of the run, without a bias at its start."""
    decay = 1 - 1 / max(len(values) / 20, 1)
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth
