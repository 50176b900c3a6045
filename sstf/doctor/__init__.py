"""Doctor: measures what goes wrong in a head, or in a run that makes one, without any error."""

from sstf.doctor.examine import check_head, examine
from sstf.doctor.report import Check, Question, Report, print_report

__all__ = ["Check", "Question", "Report", "check_head", "examine", "print_report"]
