"""Row counts that recur, for matrix products on a CPU.

oneDNN compiles a kernel for every shape of a bfloat16 product that it meets, and keeps up to 1,024 of them. On a
Xeon with AMX one costs 3 to 12 ms and about 1 MB. Packed batches have ever other numbers of rows: a training step met
some twenty new shapes, and 25 steps later the process was 300 MB larger. With rows in whole blocks it stays as it is.
"""

from __future__ import annotations

from torch import Tensor, device
from torch.nn import functional as F

ROWS = 128  # of a block


def missing(rows: int, where: device) -> int:
    """Rows that a product of so many lacks to whole blocks; none on other devices, whose kernels take any shape.

    >>> missing(1000, device("cpu")), missing(1000, device("cuda"))
    (24, 0)
    """
    return -rows % ROWS if where.type == "cpu" else 0


def filled(table: Tensor) -> Tensor:
    """[row, ...] with rows of zeros (False in a mask) behind, up to whole blocks."""
    lacking = missing(len(table), table.device)
    return F.pad(table, (0, 0) * (table.ndim - 1) + (0, lacking)) if lacking else table
