"""How to serve a head: depth, width and tokens by batch size and context length, from measured costs and acceptance."""

from sstf.tune.measure import TuneConfig, measure
from sstf.tune.plan import Choice, Measured, TunePlan, plan
from sstf.tune.report import launch_lines, print_plan, write_plan

__all__ = [
    "Choice",
    "Measured",
    "TuneConfig",
    "TunePlan",
    "launch_lines",
    "measure",
    "plan",
    "print_plan",
    "write_plan",
]
