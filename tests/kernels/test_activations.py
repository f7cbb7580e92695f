"""Blocks of activations: what is kept, when it goes, and that no peak grows by it."""

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte.data.batch import build_batch
from halfbyte.kernels import activations, backends, linear, linear_input_gradient
from halfbyte.kernels.activations import activation
from halfbyte.kernels.gemm import matmul
from halfbyte.optim.accumulators import ResidentAccumulator
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.methods import attach_trained, open_base
from halfbyte.training.run_data import open_run_data
from halfbyte.training.step import compute_gradients
from training.tiny_run import make_config

pytestmark = pytest.mark.skipif(not backends.native_in_use(), reason="native kernels are absent")

PAGE = mmap.PAGESIZE
LIKE = torch.zeros(1)


def blocks(pages: int) -> Tensor:
    """An activation of so many pages."""
    return activation(LIKE, (pages, PAGE // 4))


@pytest.fixture
def reuse() -> Iterator[None]:
    with activations.reusing(least=PAGE):
        yield


@pytest.mark.usefixtures("reuse")
def test_a_result_takes_the_block_of_one_that_is_gone() -> None:
    first = blocks(8)
    place = first.data_ptr()
    del first
    assert activations.usage().kept == 8 * PAGE
    second = blocks(8)
    assert second.data_ptr() == place
    assert activations.usage().kept == 0


X = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
HEADS = X.view(512, 2, 32)
SEGMENT = torch.tensor([0, 512], dtype=torch.int32)
operators = torch.ops.halfbyte


def attention_gradients() -> object:
    out, lse = operators.attention(HEADS, HEADS, HEADS, SEGMENT, SEGMENT, 0.2, None, None)
    return operators.attention_backward(
        HEADS, HEADS, HEADS, HEADS, out, lse, SEGMENT, SEGMENT, 0.2, None, None
    )


MAKERS = {
    "rms_norm": lambda: operators.rms_norm(X, torch.ones(64), 1e-5),
    "add_rms_norm": lambda: operators.add_rms_norm(X, X, torch.ones(64), 1e-5),
    "rms_norm_backward": lambda: operators.rms_norm_backward(
        X, X, torch.ones(64), None, 1e-5, False
    ),
    "gated": lambda: operators.gated(X, X, "silu"),
    "gated_backward": lambda: operators.gated_backward(X, X, X, "silu"),
    "attention": attention_gradients,
    "linear_4bit": lambda: linear(X, hb.quantize(X[:64])),
    "input_gradient": lambda: linear_input_gradient(X, hb.quantize(X[:64])),
    "matmul": lambda: matmul(X, X[:64].T),
    "matmul of 16 bits": lambda: matmul(X.bfloat16(), X[:64].T.bfloat16()),
}


@pytest.mark.usefixtures("reuse", "isa")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_results_of_operators_come_from_kept_memory(make: Callable[[], object]) -> None:
    make()
    before = activations.usage().fresh
    make()
    assert activations.usage().fresh == before
    assert activations.usage().kept >= 512 * 64 * 2


@pytest.mark.usefixtures("reuse")
def test_a_block_is_cut_up_and_put_together_again() -> None:
    whole = blocks(80).fill_(7.0)
    place = whole.data_ptr()
    del whole
    fresh = activations.usage().fresh
    pieces = [blocks(pages).fill_(pages) for pages in (5, 8, 20, 47)]
    places = sorted((piece.data_ptr() - place) // PAGE for piece in pieces)
    assert places == [0, 5, 13, 33]
    assert [int(piece.min()) for piece in pieces] == [5, 8, 20, 47]
    assert activations.usage().kept == 0
    kept = pieces.pop(0)
    pieces.clear()
    rest = blocks(75).fill_(1.0)
    assert rest.data_ptr() == place + 5 * PAGE
    assert torch.all(kept == 5)
    del rest, kept
    assert blocks(80).fill_(2.0).data_ptr() == place
    assert activations.usage().fresh == fresh


@pytest.mark.usefixtures("reuse")
def test_the_block_nearest_in_size_is_taken() -> None:
    held = {pages: blocks(pages) for pages in (40, 36, 33, 31)}
    places = {pages: block.data_ptr() for pages, block in held.items()}
    held.clear()
    assert blocks(32).data_ptr() == places[33]
    assert blocks(36).data_ptr() == places[36]


@pytest.mark.usefixtures("reuse")
@pytest.mark.skipif(sys.platform != "linux", reason="pages are moved on Linux")
@pytest.mark.parametrize(("pages", "fresh"), [(80, 0), (100, 0), (160, 0), (200, 40)])
def test_a_block_is_put_together_of_scattered_ones(pages: int, fresh: int) -> None:
    held = [blocks(40).fill_(number) for number in range(8)]
    del held[::2]
    before = activations.usage().fresh
    made = blocks(pages).fill_(9.0)
    usage = activations.usage()
    assert usage.fresh - before == fresh * PAGE
    assert (usage.used, usage.kept) == ((160 + pages) * PAGE, (160 + fresh - pages) * PAGE)
    assert [float(block.max()) for block in held] == [1.0, 3.0, 5.0, 7.0]
    # What was moved is cut up and moved once more.
    del made
    pieces = [blocks(20).fill_(number) for number in range(pages // 20)]
    del pieces[::2]
    blocks(40).fill_(8.0)
    assert activations.usage().fresh - before == fresh * PAGE
    assert [float(piece.min()) for piece in pieces] == [float(n) for n in range(1, pages // 20, 2)]


@pytest.mark.usefixtures("reuse")
def test_what_is_not_kept_is_fresh_and_small_pieces_go_for_it() -> None:
    held = [blocks(10) for _ in range(8)]
    del held[::2]
    before = activations.usage().fresh
    made = blocks(50).fill_(1.0)
    usage = activations.usage()
    assert usage.fresh - before == 50 * PAGE
    assert (usage.used, usage.kept) == (90 * PAGE, 0)
    assert torch.all(made == 1.0)


@pytest.mark.usefixtures("reuse")
def test_in_use_and_kept_never_exceed_the_most_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    held: list[tuple[int, Tensor]] = []
    most = 0
    for number in range(2000):
        if held and torch.rand(1, generator=generator) < 0.5:
            pages, block = held.pop(int(torch.randint(len(held), (1,), generator=generator)))
            assert block.min() == block.max()  # nobody else wrote there
            del block
        else:
            pages = int(torch.randint(1, 60, (1,), generator=generator))
            held.append((pages, blocks(pages).fill_(number)))
        used = sum(pages for pages, _ in held) * PAGE
        most = max(most, used)
        assert activations.usage().kept + used <= most


@pytest.mark.usefixtures("reuse")
def test_release_gives_back_what_is_kept_and_forgets_the_most() -> None:
    large = blocks(100)
    del large
    activations.release()
    assert activations.usage().kept == 0
    small, other = blocks(2), blocks(3)
    del small
    assert activations.usage().kept == 2 * PAGE
    assert blocks(50).shape == (50, PAGE // 4)  # more than ever: nothing stays beside it
    assert other.shape == (3, PAGE // 4)


@pytest.mark.parametrize(("beside", "kept", "later"), [(0, 64, 32), (8, 56, 24), (1000, 2, 0)])
def test_what_arrives_beside_has_room(beside: int, kept: int, later: int) -> None:
    with activations.reusing(least=PAGE, beside=beside * PAGE):
        held = [blocks(1) for _ in range(64)]
        del held
        assert activations.usage().kept == kept * PAGE
        # By the next tensors, too, when what was to arrive may be there.
        again = [blocks(1) for _ in range(32)]
        assert activations.usage().kept == later * PAGE
        assert len(again) == 32


def test_nothing_is_kept_outside_and_tensors_outlive_the_block() -> None:
    with activations.reusing(least=PAGE):
        kept = blocks(8).fill_(7.0)
    assert activations.usage().kept == 0
    assert torch.all(kept == 7.0)
    del kept
    assert activations.usage().kept == 0
    blocks(8)
    assert activations.usage().kept == 0


@pytest.mark.usefixtures("reuse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5000), (3, 0, 7), (5000,), (70, 3, 50)])
def test_shape_strides_and_dtype_are_as_asked(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = activation(LIKE, shape, dtype)
    expected = torch.empty(shape, dtype=dtype)
    assert (made.shape, made.stride(), made.dtype) == (shape, expected.stride(), dtype)
    made.fill_(1)
    assert made.numel() == expected.numel()
    assert torch.all(made == 1)


@pytest.mark.usefixtures("reuse")
@pytest.mark.parametrize("shape", [(2**40, 2**40), (-1, 8), (2**50,)])
def test_what_cannot_be_allocated_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        activation(LIKE, shape)
    assert blocks(8).shape == (8, PAGE // 4)


@pytest.mark.usefixtures("reuse")
def test_what_a_backward_gives_up_may_be_used_by_others() -> None:
    held = [blocks(8) for _ in range(10)]
    activations.release()
    given_up = activations.GivenUp()
    assert given_up.lend(2**30) == 0
    rising = blocks(16)  # so much is needed within a layer
    del held[6:]
    assert given_up.lend(2**30) == (80 - 64 - 16 // 4) * PAGE  # what rises is still there
    del rising
    assert given_up.lend(2**30, keep=3 * PAGE) == (32 - 16 // 4 - 3) * PAGE
    usage = activations.usage()
    assert (usage.used, usage.most, usage.kept) == (48 * PAGE, 96 * PAGE, 48 * PAGE)
    assert given_up.lend(PAGE) == 25 * PAGE
    again = blocks(40)
    assert given_up.lend(2**30) == 25 * PAGE  # as before: it was counted on for all that comes
    del again
    held.clear()
    assert given_up.lend(2**30) == (80 - 16 // 4) * PAGE


def lend_all_of(pages: int) -> None:
    """What a backward pass has given up that began with so many pages."""
    held = [blocks(pages // 10) for _ in range(10)]
    activations.release()
    given_up = activations.GivenUp()
    held.clear()
    assert given_up.lend(2**30) == pages * PAGE


@pytest.mark.usefixtures("reuse")
def test_others_get_kept_memory_and_leave_it_to_activations() -> None:
    lend_all_of(320)
    fresh = activations.usage().fresh
    borrowed = [activations.lent_buffer(64 * PAGE).fill_(number) for number in range(3)]
    assert all(buffer.data_ptr() % PAGE == 0 for buffer in borrowed)
    usage = activations.usage()
    assert (usage.used, usage.kept, usage.out) == (0, 128 * PAGE, 192 * PAGE)
    held = [blocks(32) for _ in range(4)]
    assert activations.usage().kept == 0
    own = activations.lent_buffer(160 * PAGE)  # more than is lent: not at the cost of activations
    assert activations.usage().out == 192 * PAGE
    assert activations.usage().fresh - fresh == 160 * PAGE
    assert [int(buffer.max()) for buffer in borrowed] == [0, 1, 2]
    borrowed.clear()
    assert activations.usage().out == 0
    del own
    usage = activations.usage()
    assert usage.kept == 192 * PAGE  # of the 320 there were, for 128 are in use
    held.clear()
    assert activations.usage().kept == 320 * PAGE


@pytest.mark.usefixtures("reuse")
def test_what_is_out_counts_until_the_loan_ends() -> None:
    lend_all_of(320)
    borrowed = activations.lent_buffer(120 * PAGE)
    activations.release()
    assert activations.usage().out == 120 * PAGE
    other = activations.lent_buffer(32 * PAGE)
    assert activations.usage().out == 120 * PAGE
    held = [blocks(32) for _ in range(10)]
    held.clear()
    assert activations.usage().kept == (320 - 120) * PAGE
    activations.end_loan()
    assert activations.usage().out == 0
    held = [blocks(32) for _ in range(10)]
    held.clear()
    assert activations.usage().kept == 320 * PAGE
    torch.ops.halfbyte.lend_activations(80 * PAGE)
    later = activations.lent_buffer(80 * PAGE)
    del borrowed, other  # of the loan before, so no part of this one comes back
    usage = activations.usage()
    assert (usage.kept, usage.out) == (240 * PAGE, 80 * PAGE)
    del later
    usage = activations.usage()
    assert (usage.kept, usage.out) == (320 * PAGE, 0)


def test_nothing_is_lent_without_reuse() -> None:
    given_up = activations.GivenUp()
    assert given_up.lend(2**30) == 0
    assert activations.lent_buffer(PAGE).fill_(1).sum() == PAGE
    usage = activations.usage()
    assert (usage.kept, usage.out) == (0, 0)


def test_senseless_loans_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bytes: 0, or a number of bytes expected, found -1"):
        torch.ops.halfbyte.lend_activations(-1)
    with pytest.raises(RuntimeError, match="bytes: a number of bytes expected, found 0"):
        torch.ops.halfbyte.lent_buffer(0)
    with pytest.raises(RuntimeError, match="cannot allocate memory"):
        activations.lent_buffer(2**60)
    with pytest.raises(RuntimeError, match="bytes: a number of bytes expected, found"):
        activations.lent_buffer(2**63 - 1)
    assert activations.usage().out == 0


REFUSED = """
import torch
from halfbyte.kernels import activations
like = torch.zeros(1)
with activations.reusing(least=4096):
    held = [activations.activation(like, (40, 1024)).fill_(n) for n in range(8)]
    del held[::2]
    before = activations.usage()
    made = activations.activation(like, (100, 1024)).fill_(9.0)
    after = activations.usage()
    assert after.fresh - before.fresh == made.nbytes, (before, after)
    assert after.used + after.kept <= before.most, (before, after)
    assert [int(block.sum()) for block in held] == [n * 40960 for n in (1, 3, 5, 7)]
    assert int(made.sum()) == 9 * 102400
    del made, held
    assert activations.usage().used == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are moved on Linux")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_the_system_refuses_to_move_is_fresh(tmp_path: Path) -> None:
    refuses = tmp_path / "refuses.so"
    source = "void *mremap(void *p, ...) { return (void *)-1; }"
    compile_it = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(refuses)]
    subprocess.run(compile_it, input=source, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {refuses}"}
    subprocess.run([sys.executable, "-c", REFUSED], env=environment, check=True)


@pytest.mark.parametrize(("least", "beside"), [(-1, 0), (PAGE, -1)])
def test_senseless_settings_are_refused(least: int, beside: int) -> None:
    with pytest.raises(RuntimeError, match="expected, found"):
        torch.ops.halfbyte.reuse_activations(least, beside)


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(
        torch.ops.halfbyte.activation.default,
        (LIKE, [3, 4], torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),  # what is in it is nobody's business
    )


def test_no_gradient_reaches_what_a_result_was_made_like() -> None:
    assert not activation(torch.zeros(1, requires_grad=True), (4,)).requires_grad


@pytest.mark.parametrize("recompute", [0, 2])
def test_steps_have_the_same_bits_and_little_fresh_memory(tmp_path: Path, recompute: int) -> None:
    config = make_config(tmp_path, "lora.dropout=0")
    model = attach_trained(open_base(config), config)
    data = open_run_data(config, Tokenizer.load(config.model))
    parameters = list(model.parameters.values())
    batch = build_batch(data.train, list(range(8)))

    def steps(count: int) -> tuple[list[float], list[Tensor], list[int]]:
        accumulator = ResidentAccumulator(parameters)
        losses, fresh = [], []
        for _ in range(count):
            before = activations.usage().fresh
            found = compute_gradients(model.decoder, [batch], accumulator, recompute=recompute)
            losses.append(found.loss)
            fresh.append(activations.usage().fresh - before)
        return losses, [p.grad.clone() for p in parameters if p.grad is not None], fresh

    losses, gradients, none = steps(1)
    assert none == [0]
    with activations.reusing(least=PAGE, beside=2**40):
        churned = steps(2)[2][-1]
    with activations.reusing(least=PAGE):
        found = steps(3)
    assert found[0] == losses * 3
    for one, other in zip(gradients, found[1], strict=True):
        assert torch.equal(one, other)
    # What was not in use when the most was had to leave then, and is fresh each time: logits here.
    first, second, third = found[2]
    assert max(second, third) < first
    assert max(second, third) < churned / 2
