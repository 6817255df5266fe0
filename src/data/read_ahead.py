"""Reading a mapped file before it is touched: else each first touch waits for the disk, and reads a small piece."""

import ctypes
import mmap

import torch
from torch import Tensor

WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)  # Windows has none
LIBC = None if WILL_NEED is None else ctypes.CDLL(None)
PIECE = 128 * 1024  # bytes, that Linux reads from the disk at a touch


def read_ahead(stored: Tensor, rows: Tensor) -> None:
    """Ask the system to read (n,) rows of a tensor (N, ...) over a mapped file, without waiting for it.

    It may take no notice. Small rows are left to the first touch: asking takes longer than it saves where they are in memory.
    """
    row_bytes = stored[0].numel() * stored.element_size()
    if LIBC is None or row_bytes < PIECE:
        return
    stride = stored.stride(0) * stored.element_size()
    for row in torch.unique(rows).tolist():
        start = stored.data_ptr() + row * stride
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + row_bytes - page), WILL_NEED)
