"""Reading expressions: their trees, and every fault with its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.composition.expression import (
    Dare,
    Name,
    Node,
    Stack,
    Sum,
    Svd,
    Ties,
    stacks_of,
    to_text,
    weights_of,
)
from halfbyte.composition.parser import parse
from halfbyte.errors import UsageError

NAMES = ("sql", "tone", "verbose")
SQL, TONE = Name("sql"), Name("tone")

TREES = [
    ("sql", SQL),
    ("0.7*sql + 0.3*tone - 0.2*verbose", Sum(((0.7, SQL), (0.3, TONE), (-0.2, Name("verbose"))))),
    (" -( sql+2 * tone)/4\n", Sum(((-0.25, SQL), (-0.5, TONE)))),
    ("sql*.5*4e0", Sum(((2.0, SQL),))),
    ("1/4*sql - - tone", Sum(((0.25, SQL), (1.0, TONE)))),
    ("sql > tone", Stack((SQL, TONE))),
    ("2*(sql > tone) + sql", Sum(((2.0, Stack((SQL, TONE))), (1.0, SQL)))),
    ("ties(sql, 2*tone, density=0.5)", Ties((SQL, Sum(((2.0, TONE),))), 0.5)),
    ("dare(sql, tone, drop=0.3, seed=1)", Dare((SQL, TONE), 0.3, 1)),
    ("dare(sql, drop=0)", Dare((SQL,), 0.0, 0)),
    ("svd(sql - tone, rank=16)", Svd(Sum(((1.0, SQL), (-1.0, TONE))), rank=16)),
    ("svd(sql, fidelity=0.99)", Svd(SQL, fidelity=0.99)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tree"), TREES, ids=[text for text, _ in TREES])
def test_trees(text: str, tree: Node) -> None:
    assert parse(text, NAMES) == tree


FAULTS = [
    ("sql +", "     ^ an adapter or a number expected, found the end"),
    ("sql $ tone", "    ^ a name, a number or one of"),
    ("sql tone", "    ^^^^ an operator or the end expected, found 'tone'"),
    ("(sql", "    ^ ')' expected, found the end"),
    ("0.3*ton", "    ^^^ no adapter 'ton'. Did you mean 'tone'?"),
    ("q + sql", "^ no adapter 'q'. There are: sql, tone, verbose."),
    ("sql + 0.5", "      ^^^ an adapter expected, found a number"),
    ("0.5", "^^^ an adapter expected, found a number"),
    ("sql*tone", "^^^^^^^^ two adapters cannot be multiplied"),
    ("2/sql", "  ^^^ only a number can divide"),
    ("sql/0", "    ^ division by zero"),
    ("1e999*sql", "^^^^^ a finite number expected"),
    ("1e308*10*sql", "^^^^^^^^ a finite number expected"),
    ("sql > 2*tone", "      ^^^^^^ '>' orders adapters as they were trained"),
    ("sql > tone > sql", "             ^^^ 'sql' is in the stack already"),
    ("blend(sql)", "^^^^^ no function 'blend'. There are: ties, dare, svd."),
    ("ties(sql, dens=0.5)", "          ^^^^ ties takes density, not 'dens'"),
    ("ties(sql)", "^^^^ ties needs density=..."),
    ("ties(density=0.5)", "^^^^ ties of no adapter"),
    ("ties(sql, density=0)", "          ^^^^^^^^^ density: above 0 and at most 1 expected, found 0"),
    ("ties(sql, density=tone)", "                  ^^^^ density: a number expected"),
    ("ties(density=1, sql)", "                ^^^ adapters come before keywords"),
    ("dare(sql, drop=1)", "          ^^^^^^ drop: at least 0 and below 1 expected, found 1"),
    ("dare(sql, drop=0, drop=0)", "                  ^^^^ drop is given twice"),
    ("dare(sql, drop=0, seed=-1)", "                  ^^^^^^^ seed: a whole number from 0"),
    ("svd(sql, tone, rank=2)", "^^^ svd takes one expression, found 2"),
    ("svd(sql)", "^^^ svd needs one of rank=... and fidelity=..."),
    ("svd(sql, rank=2, fidelity=1)", "^^^ svd needs one of rank=... and fidelity=..."),
    ("svd(sql, rank=1.5)", "         ^^^^^^^^ rank: a whole number from 1"),
    ("sql[0]", "   ^ a name, a number or one of"),
    ("sql = 2", "    ^ an operator or the end expected, found '='"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "pointer"), FAULTS, ids=[text for text, _ in FAULTS])
def test_every_fault_is_pointed_at(text: str, pointer: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, NAMES)
    assert len(caught.value.problems) == 1
    line, place = caught.value.problems[0].split("\n")
    assert line == text
    assert place.startswith(f"  {pointer}")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_expression_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        parse(text, NAMES)


def test_all_faults_come_at_once_in_order() -> None:
    with pytest.raises(UsageError, match="4 problems") as caught:
        parse("0.3*ton + 0.5 + ties(sql, density=7) tone", NAMES)
    found = [problem.partition("^ ")[2].split()[:2] for problem in caught.value.problems]
    assert found == [
        ["no", "adapter"],
        ["an", "adapter"],
        ["density:", "above"],
        ["an", "operator"],
    ]


@pytest.mark.parametrize("text", ["(" * 5000 + "sql", "svd(" * 2000, "ties(sql, density=(" * 500])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="nested deeper than 50"):
        parse(text, NAMES)


def test_length_is_limited() -> None:
    assert weights_of(parse("-" * 9001 + "sql", NAMES)) == {"sql": -1.0}
    with pytest.raises(UsageError, match="10000 characters"):
        parse("sql+" * 5000 + "sql", NAMES)


def test_long_expressions_are_shown_around_the_fault() -> None:
    text = "0.5*sql + " * 50 + "oops + " + "0.5*sql + " * 50 + "sql"
    with pytest.raises(UsageError) as caught:
        parse(text, NAMES)
    line, place = caught.value.problems[0].split("\n")
    assert len(line) < 80
    carets = place.removeprefix("  ").partition("^^^^ ")
    assert line[len(carets[0]) :].startswith("oops")


@given(st.text(alphabet="sqltone()+-*/>,=.0123 \t\nédare", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        tree = parse(text, NAMES)
    except UsageError:
        return
    assert weights_of(parse(to_text(tree), NAMES)).keys() == weights_of(tree).keys()


nodes = st.recursive(
    st.sampled_from([Name(name) for name in NAMES] + [Stack((SQL, TONE))]),
    lambda inner: st.one_of(
        st.builds(
            lambda terms: Sum(tuple(t for t in terms if not isinstance(t[1], Sum)) or ((2.0, SQL),)),
            st.lists(st.tuples(st.floats(-9, 9).filter(bool), inner), min_size=1, max_size=3),
        ),
        st.builds(Ties, st.lists(inner, min_size=1, max_size=3).map(tuple), st.just(0.5)),
        st.builds(Dare, st.lists(inner, min_size=1, max_size=2).map(tuple), st.just(0.1), st.integers(0, 9)),
        st.builds(Svd, inner, rank=st.integers(1, 99)),
        st.builds(Svd, inner, fidelity=st.floats(0.01, 1)),
    ),
    max_leaves=6,
)  # fmt: skip


@given(nodes)
def test_text_of_a_tree_parses_to_it(node: Node) -> None:
    again = parse(to_text(node), NAMES)
    # `1*x` is written as `x`: the same update.
    assert to_text(again) == to_text(node)
    assert weights_of(again) == pytest.approx(weights_of(node))


def test_weights_and_stacks() -> None:
    tree = parse("sql - 0.5*ties(2*sql, tone > verbose, density=1)", NAMES)
    assert weights_of(tree) == {"sql": 0.0, "tone": -0.5, "verbose": -0.5}
    assert list(stacks_of(tree)) == [Stack((TONE, Name("verbose")))]
