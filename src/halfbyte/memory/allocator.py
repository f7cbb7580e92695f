"""Memory that is free goes back to the system: what is resident is what is in use.

glibc's malloc takes blocks above a threshold straight from the system and gives them back when
they are freed. By default the threshold grows to 32 MiB as such blocks are freed; from then on
activations come from a heap, whose holes between live blocks stay resident. In training that is
10 % of the memory and more, and it grows over the first steps. A fixed threshold ends both, at the
price of page faults: blocks are new to the process each time.

The threshold alone does not do it where the heap already has free chunks of that size, as after
reading a large tokenizer: malloc looks there first, and pages of a chunk, once touched, stay. So
such chunks are taken and never touched, which costs addresses but no memory.
"""

import ctypes

THRESHOLD_BYTES = 128 * 2**10
"""Blocks from this size on come straight from the system. It is where glibc starts, too."""

KEPT_BYTES = 4 * 2**20
"""What may stay free at the top of the heap, for the small blocks."""

LARGEST_CHUNK = 2**30
"""Bytes of a chunk that is looked for in the heap; larger ones are taken in parts."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_freed_memory(threshold: int = THRESHOLD_BYTES) -> bool:
    """Fix the threshold for the rest of the process, and give back what is free.

    Args:
        threshold: In bytes.

    Returns:
        Whether the C library has such a setting; it is glibc's.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    fixed = library.mallopt(_M_MMAP_THRESHOLD, threshold)
    kept = library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    trim_heap()
    _take_free_chunks(library, threshold)
    return bool(fixed and kept)


def trim_heap() -> None:
    """Give back the free pages between small blocks, which no threshold reaches; milliseconds."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _take_free_chunks(library: ctypes.CDLL, least: int) -> None:
    """Take all free chunks of at least so many bytes in the heap, for good, touching none."""
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    library.sbrk.argtypes = (ctypes.c_ssize_t,)
    size = LARGEST_CHUNK
    while size >= least:
        block = library.malloc(size)
        # The heap ends at the break; what comes straight from the system lies above.
        if block is None or block > library.sbrk(0):
            library.free(block)
            size //= 2
