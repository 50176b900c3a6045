"""Progress on a terminal (bars, a live view of a training) or in a log file (lines)."""

from __future__ import annotations

from rich.console import Console

from sstf.data.progress import Progress
from sstf.progress_display.bars import BarProgress
from sstf.progress_display.lines import LogProgress

__all__ = ["BarProgress", "LogProgress", "display"]


def display(console: Console) -> Progress:
    """Bars on a terminal that can redraw them, lines elsewhere."""
    return BarProgress(console) if console.is_interactive else LogProgress(console)
