"""How much room a paged optimizer is asked to make."""

from types import SimpleNamespace

import pytest
import torch

from halfbyte.kernels import activations, backends
from halfbyte.kernels.activations import activation
from halfbyte.training.room import Room, set_aside

MB = 10**6
LIKE = torch.zeros(1)


class Optimizer:
    """Notes what it is asked for."""

    paged = True
    resident_bytes = 3 * MB

    def __init__(self) -> None:
        self.asked: list[int] = []

    def make_room(self, num_bytes: int) -> int:
        self.asked.append(num_bytes)
        return 0


def room_that_saw(taken: int, num_tokens: int) -> tuple[Room, Optimizer]:
    """One micro-batch of so many tokens was seen to take so much."""
    optimizer = Optimizer()
    sampler = SimpleNamespace(reset_besides=lambda: 0, peak_besides=taken)
    room = Room(optimizer, sampler)  # type: ignore[arg-type]
    with room.around(num_tokens):
        pass
    return room, optimizer


def test_as_much_as_was_seen_and_more_for_more_tokens() -> None:
    room, optimizer = room_that_saw(100 * MB, 512)
    for num_tokens in (256, 512, 1024):
        with room.around(num_tokens):
            pass
    before_the_first, *asked = optimizer.asked
    assert before_the_first > 2**50
    assert asked == [110 * MB, 110 * MB, 220 * MB]


@pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")
def test_what_activations_have_left_is_there_already() -> None:
    room, optimizer = room_that_saw(100 * MB, 512)
    with activations.reusing():
        left = activation(LIKE, (30 * MB // 4,))
        del left
        kept = activations.usage().kept
        assert kept >= 30 * MB
        assert set_aside(optimizer) == 3 * MB + kept  # type: ignore[arg-type]
        with room.around(512):
            pass
        left = activation(LIKE, (300 * MB // 4,))
        del left
        with room.around(512):
            pass
    assert optimizer.asked[1:] == [110 * MB - kept, 0]
