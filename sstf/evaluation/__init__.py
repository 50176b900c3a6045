"""Evaluation: suites, protocol, figures, reports."""

from sstf.evaluation.config import EvalConfig
from sstf.evaluation.report import hardware, write_report
from sstf.evaluation.run import Row, evaluate
from sstf.evaluation.suites import Prompt, load_suite

__all__ = ["EvalConfig", "Prompt", "Row", "evaluate", "hardware", "load_suite", "write_report"]
