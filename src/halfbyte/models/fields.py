"""Typed, bounded access to a JSON object that strangers wrote, with all faults at once."""

from collections.abc import Mapping


class Fields:
    """Typed access to a JSON object; faults are collected, and the default stands in.

    Attributes:
        problems: One line a fault. A nested object adds its own to the same list.
    """

    def __init__(
        self, values: Mapping[str, object], problems: list[str], *, where: str = ""
    ) -> None:
        self._values = values
        self._where = where
        self.problems = problems

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def fault(self, key: str, expected: str) -> None:
        """Note that `key` holds something else than `expected`."""
        found = repr(self._values[key])[:80] if key in self._values else "nothing"
        self.problems.append(f"{self._where}{key}: {expected} expected, found {found}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number of a range; required when there is no default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fault(key, f"a whole number from {low} to {high}")
            return low
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        low: float = 0.0,
        high: float = 1e12,
        zero: bool = False,
    ) -> float:
        """A finite number above `low` (or equal, if `zero`); required without a default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        # Comparing, not converting: NaN fails every comparison, and no integer is too large for it.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (low <= value if zero else low < value)
            or value > high
        ):
            self.fault(key, f"a number {'from' if zero else 'above'} {low:g} up to {high:g}")
            return 1.0
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None when absent."""
        return self.number(key) if key in self else None

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(key, "true or false")
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.fault(key, "a string")
            return ""
        return value

    def nested(self, key: str) -> "Fields | None":
        """An object inside this one, or None when absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fault(key, "an object")
            return None
        return Fields(value, self.problems, where=f"{self._where}{key}.")

    def texts(self, key: str, count: int) -> list[str] | None:
        """A list of `count` strings, or None when absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            self.fault(key, f"a list of {count} strings")
            return None
        if not all(isinstance(item, str) for item in value):
            self.fault(key, f"a list of {count} strings")
            return None
        return value

    def token_ids(self, key: str, vocabulary: int) -> tuple[int, ...]:
        """One token id or a list of them; empty when absent."""
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary for i in ids
        ):
            self.fault(key, f"token ids from 0 to {vocabulary - 1}")
            return ()
        return tuple(ids)
