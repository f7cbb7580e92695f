"""Adapters of `generate` and `chat`: how they are named, and how they are mixed."""

from collections.abc import Collection, Mapping
from pathlib import Path

from halfbyte.errors import UsageError


def name_adapters(options: list[str] | None) -> dict[str, Path]:
    """Name -> path of options such as `sql=runs/sql/adapter`; a plain path is its own name.

    Raises:
        UsageError: A name cannot stand in an expression, or comes twice.
    """
    from halfbyte.cli.compose import parse_adapters

    given = options or []
    plain = [option for option in given if "=" not in option or Path(option).exists()]
    named = parse_adapters([option for option in given if option not in plain])
    if len(set(plain)) < len(plain):
        raise UsageError(f"--adapter: each once expected, found {', '.join(plain)}")
    return {**{path: Path(path) for path in plain}, **named}


def parse_mix(expression: str, names: Collection[str]) -> Mapping[str, float]:
    """Adapter -> weight of an expression such as `0.7*sql + 0.3*tone`.

    Raises:
        UsageError: It does not parse, or is no weighted sum.
    """
    from halfbyte.composition.expression import Name, Sum, to_text, weights_of
    from halfbyte.composition.parser import parse

    node = parse(expression, names)
    terms = node.terms if isinstance(node, Sum) else ((1.0, node),)
    others = [to_text(part) for _, part in terms if not isinstance(part, Name)]
    if others:
        raise UsageError(
            "--mix: a weighted sum of adapters expected",
            problems=[f"found {text}" for text in others],
            hint="`halfbyte compose` makes an adapter of any expression, `halfbyte stack build` "
            "of adapters on top of each other.",
        )
    return weights_of(node)
