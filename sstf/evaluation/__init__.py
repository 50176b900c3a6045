"""Evaluation: suites, protocol, figures, reports."""

from sstf.evaluation.config import EvalConfig
from sstf.evaluation.report import hardware, write_report
from sstf.evaluation.run import Row, evaluate

__all__ = ["EvalConfig", "Row", "evaluate", "hardware", "write_report"]
