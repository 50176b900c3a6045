"""Which thread of a process computes with all of its cores."""

from __future__ import annotations

import ctypes

import torch


def leave_cores_to_others() -> None:
    """From here on the calling thread computes alone, so that another thread has the process's cores to itself.

    Each thread that starts a parallel region keeps a pool of OpenMP threads of its own. With more of them than cores,
    GNU's runtime no longer lets idle ones wait actively, and every kernel pays for waking them: on two cores a decoder
    lost a fifth of its speed to the pool that loading had left behind in another thread. `torch.set_num_threads` would
    not do: it is for the threads to come, and MKL's is for all.

    Nothing happens where torch was built without OpenMP.
    """
    torch.get_num_threads()  # torch sets a thread's number when it first asks; afterwards it would undo ours
    limit = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
