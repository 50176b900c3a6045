"""One process or several: a training step and a whole state, whichever way the processes share the head.

`open_launch` says what the launcher started, `open_parallel` shares the head accordingly. The trainer knows nothing
else about processes.
"""

from sstf.train.parallel.base import Parallel
from sstf.train.parallel.launch import Kind, Launch, close_launch, open_launch
from sstf.train.parallel.open import open_parallel

__all__ = ["Kind", "Launch", "Parallel", "close_launch", "open_launch", "open_parallel"]
