"""What a run will need, before it runs: tokens, disk, memory, hours, and the accepted length to expect."""

from sstf.planning.plan import Plan
from sstf.planning.planner import make_plan
from sstf.planning.report import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
