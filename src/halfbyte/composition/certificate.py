"""What a merge changed, measured, and whether that is good enough to ship.

Two rules decide, both relative to what the adapter does on the probe text:

- The merged model may diverge from the live one (4-bit base and adapter beside it) by at most a
  given part of what the base alone diverges. Divergence is the mean KL over the probe's targets.
- Where the adapter clearly predicts the probe better than the base does, the merged model must
  keep at least a given part of that gain in mean log-likelihood.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from halfbyte.composition.probe import Measurement
from halfbyte.errors import VerificationError

COLUMNS = ("model", "loss", "perplexity", "gain kept", "KL to live", "of base's", "top-1", "layers")
BASE = "base alone"
LIVE = "base + adapter"

DIVERGENCE_FLOOR = 1e-3
"""Nats that are never held against a merge: a text on which the adapter hardly acts shows only
what rounding does."""
SIGNIFICANT = 2.0
"""Standard errors by which the adapter must beat the base before its gain is asked for."""
REPORT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these a merge is refused.

    Attributes:
        max_divergence: Of the base's own divergence.
        min_gain: Of the adapter's gain.
    """

    max_divergence: float = 0.5
    min_gain: float = 0.5


class MergeRefusedError(VerificationError):
    """A merge that changed more than its limits allow.

    Attributes:
        certificate: What was measured.
    """

    code = "merge-refused"

    def __init__(self, certificate: "Certificate", report: str) -> None:
        super().__init__(
            f"the merge ({certificate.chosen}) is not close enough to base and adapter",
            problems=certificate.faults(),
            hint=f"Nothing was written but {report}. A residual (--residual-rank), calibration on "
            "the adapter's own data (--calibration), or 16 bits come closer; --accept writes it "
            "as it is.",
        )
        self.certificate = certificate


@dataclass(frozen=True, slots=True)
class Certificate:
    """Measurements of a merge and of its alternatives.

    Attributes:
        live: Base and adapter on the probe text.
        strategies: The others by name, `BASE` among them.
        chosen: The one that is written.
        limits: What was asked of it.
        accepted: Whether the limits were overridden.
        details: Inputs, texts and weights, as they stand in the report.
    """

    live: Measurement
    strategies: Mapping[str, Measurement]
    chosen: str
    limits: Limits
    accepted: bool
    details: Mapping[str, object]

    def gain_kept(self, name: str) -> float | None:
        """Part of the adapter's gain that a strategy keeps; None where there is no clear gain."""
        base = self.strategies[BASE]
        gain = base.loss - self.live.loss
        if gain <= SIGNIFICANT * base.loss_excess_error:
            return None
        return (base.loss - self.strategies[name].loss) / gain

    def divergence_ratio(self, name: str) -> float | None:
        """Divergence of a strategy over that of the base; None where that is next to nothing."""
        base = self.strategies[BASE].divergence
        return self.strategies[name].divergence / base if base > DIVERGENCE_FLOOR else None

    def faults(self) -> list[str]:
        """What of the chosen strategy is beyond the limits."""
        found = self.strategies[self.chosen].divergence
        allowed = self.limits.max_divergence * self.strategies[BASE].divergence + DIVERGENCE_FLOOR
        faults = []
        if not found <= allowed:
            faults.append(
                f"KL to base + adapter: at most {allowed:.4g} nats expected "
                f"({self.limits.max_divergence:g} of the base's), found {found:.4g}"
            )
        kept = self.gain_kept(self.chosen)
        if kept is not None and not kept >= self.limits.min_gain:
            faults.append(
                f"gain kept: at least {self.limits.min_gain:.0%} of the adapter's expected, "
                f"found {kept:.0%}"
            )
        return faults

    def require_passed(self, report: str) -> None:
        """Raise where the merge is beyond its limits and not accepted nevertheless.

        Args:
            report: Where the caller will write what was measured.

        Raises:
            MergeRefusedError: It is.
        """
        if self.faults() and not self.accepted:
            raise MergeRefusedError(self, report)

    def rows(self) -> list[tuple[str, ...]]:
        """The table, one line a model; the columns are `COLUMNS`."""
        return [
            _row(LIVE, self.live, None, None),
            *(
                _row(name, one, self.gain_kept(name), self.divergence_ratio(name))
                for name, one in self.strategies.items()
            ),
        ]

    def to_json(self) -> dict[str, object]:
        """The content of `merge_report.json`."""
        faults = self.faults()
        return {
            "version": REPORT_VERSION,
            "verdict": "passed" if not faults else "accepted" if self.accepted else "refused",
            "faults": faults,
            "limits": asdict(self.limits),
            "chosen": self.chosen,
            "live": _measured(self.live),
            "strategies": {
                name: {
                    **_measured(one),
                    "gain_kept": self.gain_kept(name),
                    "divergence_of_base": self.divergence_ratio(name),
                }
                for name, one in self.strategies.items()
            },
            **self.details,
        }


def _measured(one: Measurement) -> dict[str, float | Sequence[float]]:
    return {
        "loss": one.loss,
        "perplexity": one.perplexity,
        "divergence": one.divergence,
        "changed_top1": one.changed_top1,
        "layer_errors": list(one.layer_errors),
    }


def _row(name: str, one: Measurement, kept: float | None, ratio: float | None) -> tuple[str, ...]:
    return (
        name,
        f"{one.loss:.4f}",
        f"{one.perplexity:.2f}",
        "" if kept is None else f"{kept:.1%}",
        f"{one.divergence:.5f}",
        "" if ratio is None else f"{ratio:.1%}",
        f"{one.changed_top1:.1%}",
        f"{max(one.layer_errors):.2%}",
    )
