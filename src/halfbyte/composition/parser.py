"""From the text of an expression to its tree.

    stack   = sum { ">" sum }                       both sides plain names
    sum     = product { ("+" | "-") product }
    product = signed { ("*" | "/") signed }         one adapter at most, the rest numbers
    signed  = { "+" | "-" } atom
    atom    = number | name | "(" stack ")" | function
    function = ("ties" | "dare" | "svd") "(" argument { "," argument } ")"
    argument = stack | keyword "=" signed

Recursive descent. Faults of meaning (an unknown name, a keyword that a function does not take, a
number where an adapter is needed) are collected; one of syntax ends the reading.
"""

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass

from halfbyte.composition.expression import Name, Node, Stack, Sum
from halfbyte.composition.functions import Call, Keyword, build
from halfbyte.composition.tokens import (
    Fault,
    Kind,
    Span,
    SyntaxFault,
    Token,
    error_for,
    tokenize,
)
from halfbyte.errors import UsageError

MAX_DEPTH = 50

_UNKNOWN = Name("")
"""Stands for what is faulty, so that the rest can be read."""


@dataclass(frozen=True, slots=True)
class _Operand:
    """A number or an adapter, and where it is written."""

    value: float | Node
    span: Span


def parse(text: str, names: Collection[str]) -> Node:
    """Read an expression.

    Args:
        text: As in `0.7*sql + 0.3*tone`.
        names: The adapters there are.

    Raises:
        UsageError: It is empty, malformed or means nothing; every fault is shown with a caret
            under its place.
    """
    if not text.strip():
        raise UsageError(
            "the expression is empty", hint="Write one such as 0.7*a + 0.3*b over the adapters."
        )
    parser = _Parser(names)
    node: Node = _UNKNOWN
    try:
        node = parser.parse(text)
    except SyntaxFault as error:
        parser.faults.append(error.fault)
    if parser.faults:
        raise error_for(text, parser.faults)
    return node


class _Parser:
    def __init__(self, names: Collection[str]) -> None:
        self.faults: list[Fault] = []
        self._names = names
        self._tokens: list[Token] = []
        self._position = 0
        self._depth = 0

    def parse(self, text: str) -> Node:
        self._tokens = tokenize(text)
        node = self._adapter(self._stack())
        last = self._next
        if last.kind is not Kind.END:
            raise self._unexpected("an operator or the end")
        return node

    @property
    def _next(self) -> Token:
        return self._tokens[self._position]

    def _take(self) -> Token:
        token = self._next
        self._position += 1
        return token

    def _accept(self, symbols: str) -> Token | None:
        token = self._next
        if token.kind is Kind.SYMBOL and token.text in symbols:
            return self._take()
        return None

    def _expect(self, symbol: str) -> Token:
        token = self._accept(symbol)
        if token is None:
            raise self._unexpected(f"{symbol!r}")
        return token

    def _unexpected(self, expected: str) -> SyntaxFault:
        token = self._next
        found = "the end" if token.kind is Kind.END else repr(token.text)
        return SyntaxFault(Fault(token.span, f"{expected} expected, found {found}"))

    def _fault(self, span: Span, message: str) -> None:
        self.faults.append(Fault(span, message))

    def _adapter(self, operand: _Operand) -> Node:
        """The operand, which has to be an adapter."""
        if isinstance(operand.value, float):
            self._fault(operand.span, "an adapter expected, found a number")
            return _UNKNOWN
        return operand.value

    def _stack(self) -> _Operand:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SyntaxFault(Fault(self._next.span, f"nested deeper than {MAX_DEPTH}"))
        operands = [self._sum()]
        while self._accept(">"):
            operands.append(self._sum())
        self._depth -= 1
        if len(operands) == 1:
            return operands[0]
        span = operands[0].span.to(operands[-1].span)
        return _Operand(Stack(tuple(self._stacked(operands))), span)

    def _stacked(self, operands: list[_Operand]) -> list[Name]:
        parts: list[Name] = []
        for operand in operands:
            if not isinstance(operand.value, Name):
                self._fault(
                    operand.span,
                    "'>' orders adapters as they were trained: a plain name expected; "
                    "use '+' to mix",
                )
            elif operand.value in parts and operand.value != _UNKNOWN:
                self._fault(operand.span, f"{operand.value.name!r} is in the stack already")
            else:
                parts.append(operand.value)
        return parts

    def _sum(self) -> _Operand:
        first = self._product()
        if not (self._next.kind is Kind.SYMBOL and self._next.text in "+-"):
            return first
        terms = [(1.0, self._adapter(first))]
        last = first
        while sign := self._accept("+-"):
            last = self._product()
            terms.append((-1.0 if sign.text == "-" else 1.0, self._adapter(last)))
        return _Operand(_flattened(terms), first.span.to(last.span))

    def _product(self) -> _Operand:
        left = self._signed()
        while operator := self._accept("*/"):
            right = self._signed()
            left = self._combined(left, operator, right)
        return left

    def _combined(self, left: _Operand, operator: Token, right: _Operand) -> _Operand:
        span = left.span.to(right.span)
        a, b = left.value, right.value
        if _UNKNOWN in (a, b):
            return _Operand(_UNKNOWN, span)
        if operator.text == "/":
            if not isinstance(b, float):
                self._fault(right.span, "only a number can divide")
            elif b == 0:
                self._fault(right.span, "division by zero")
            else:
                value = a / b if isinstance(a, float) else _scaled(1 / b, a)
                return self._finite(_Operand(value, span))
        elif isinstance(a, float):
            value = a * b if isinstance(b, float) else _scaled(a, b)
            return self._finite(_Operand(value, span))
        elif isinstance(b, float):
            return self._finite(_Operand(_scaled(b, a), span))
        else:
            self._fault(span, "two adapters cannot be multiplied: one side has to be a number")
        return _Operand(_UNKNOWN, span)

    def _finite(self, operand: _Operand) -> _Operand:
        value = operand.value
        weights = [value] if isinstance(value, float) else []
        if isinstance(value, Sum):
            weights = [weight for weight, _ in value.terms]
        if not all(math.isfinite(weight) for weight in weights):
            self._fault(operand.span, "a finite number expected")
            return _Operand(_UNKNOWN, operand.span)
        return operand

    def _signed(self) -> _Operand:
        first = self._next.span
        sign = 1.0
        while token := self._accept("+-"):
            sign = -sign if token.text == "-" else sign
        operand = self._atom()
        if sign > 0:
            return operand
        value = operand.value
        negated = -value if isinstance(value, float) else _scaled(-1.0, value)
        return _Operand(negated, first.to(operand.span))

    def _atom(self) -> _Operand:
        token = self._next
        if token.kind is Kind.NUMBER:
            self._take()
            return self._finite(_Operand(float(token.text), token.span))
        if token.kind is Kind.NAME:
            self._take()
            if self._next.text == "(":
                return self._function(token)
            return _Operand(self._name(token), token.span)
        opening = self._accept("(")
        if opening is None:
            raise self._unexpected("an adapter or a number")
        inner = self._stack()
        return _Operand(inner.value, opening.span.to(self._expect(")").span))

    def _name(self, token: Token) -> Name:
        if token.text in self._names:
            return Name(token.text)
        close = difflib.get_close_matches(token.text, self._names, n=1)
        known = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(self._names)}."
        self._fault(token.span, f"no adapter {token.text!r}. {known}")
        return _UNKNOWN

    def _function(self, name: Token) -> _Operand:
        self._expect("(")
        parts: list[Node] = []
        keywords: list[Keyword] = []
        while True:
            self._argument(parts, keywords)
            if not self._accept(","):
                break
        span = name.span.to(self._expect(")").span)
        call = Call(name.text, name.span, tuple(parts), tuple(keywords))
        return _Operand(build(call, self._fault) or _UNKNOWN, span)

    def _argument(self, parts: list[Node], keywords: list[Keyword]) -> None:
        if self._next.kind is not Kind.NAME or self._tokens[self._position + 1].text != "=":
            operand = self._stack()
            if keywords:
                self._fault(operand.span, "adapters come before keywords")
            parts.append(self._adapter(operand))
            return
        keyword = self._take()
        self._expect("=")
        operand = self._signed()
        value = operand.value if isinstance(operand.value, float) else None
        if value is None and operand.value != _UNKNOWN:
            self._fault(operand.span, f"{keyword.text}: a number expected")
        span = keyword.span.to(operand.span)
        keywords.append(Keyword(keyword.text, keyword.span, value, span))


def _scaled(weight: float, node: Node) -> Node:
    if isinstance(node, Sum):
        return Sum(tuple((weight * factor, part) for factor, part in node.terms))
    return Sum(((weight, node),))


def _flattened(terms: list[tuple[float, Node]]) -> Sum:
    flat: list[tuple[float, Node]] = []
    for weight, node in terms:
        scaled = _scaled(weight, node)
        flat += scaled.terms if isinstance(scaled, Sum) else ()
    return Sum(tuple(flat))
