"""Functions and their docstrings, out of a library."""

import json
from pathlib import Path

import pytest

from halfbyte.cli import demo_data
from halfbyte.cli.demo_data import collect_pairs
from halfbyte.errors import DataError

GOOD = '''
class Thing:
    @property
    def first(self):
        """Return the first
        of all the parts.

        A second paragraph that is not taken.
        """
        return self.parts[0]  # a comment goes

    async def second(self, name):
        "Wait for the part of that name."
        return await self.find(name)
'''

BAD = (
    '''
def copy(self):
    """Another docstring for code seen before, under another name."""
    return self.parts[0]

def only(self):
    """A function that does nothing at all."""

def short():
    """Too short a function."""
    pass

def brief(self, value):
    """Brief."""
    return self.parts[value] + 1

def silent(self, value):
    return self.parts[value] + 1

def again(self, value):
    """wait for THE part of that name."""
    return self.parts[value] + 2

def long(self):
    """Return something after a very long way."""
'''
    + "    self.parts.clear()\n" * 20
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "MIN_TRAINED", 1)
    monkeypatch.setattr(demo_data, "NUM_HELD_OUT", 0)


def test_functions_are_taken_once_without_their_docstrings(few: None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text(GOOD)
    (tmp_path / "b.py").write_text(BAD)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(GOOD.replace("parts", "bits"))
    found = collect_pairs(tmp_path)
    assert found.held_out == ()
    assert {(f.module, f.docstring) for f in found.trained} == {
        ("a", "Return the first of all the parts."),
        ("a", "Wait for the part of that name."),
        ("b", "Another docstring for code seen before, under another name."),
    }
    first = next(f for f in found.trained if "first" in f.docstring)
    assert first.code == "@property\ndef first(self):\n    return self.parts[0]"
    row = json.loads(first.as_row())["messages"]
    assert [m["role"] for m in row] == ["system", "user", "assistant"]
    assert row[1]["content"] == first.code


@pytest.mark.slow
def test_whole_modules_of_the_real_library_are_held_out() -> None:
    found = collect_pairs()
    assert len(found.held_out) == demo_data.NUM_HELD_OUT
    modules = [f.module for f in found.held_out]
    assert max(modules.count(m) for m in modules) <= demo_data.MAX_HELD_OUT_PER_MODULE
    assert not set(modules) & {f.module for f in found.trained}
    functions = [*found.trained, *found.held_out]
    assert len({f.code for f in functions}) == len(functions)
    assert len({f.docstring.casefold() for f in functions}) == len(functions)
    assert len(found.trained) > 1000


def test_a_library_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="200 documented functions expected"):
        collect_pairs(tmp_path)
