"""Evaluation: suites, protocol, figures, reports."""

from sstf.evaluation.config import EvalConfig
from sstf.evaluation.report import write_report
from sstf.evaluation.run import Evaluation, Row, compare_heads, evaluate, measure
from sstf.evaluation.suites import Prompt, load_suite
from sstf.machine import hardware

__all__ = [
    "EvalConfig",
    "Evaluation",
    "Prompt",
    "Row",
    "compare_heads",
    "evaluate",
    "hardware",
    "load_suite",
    "measure",
    "write_report",
]
