"""Heads in the forms of serving engines and other trainers: written, read back, imported."""

from sstf.formats.eagle3 import ExportConfig, export_eagle3
from sstf.formats.layer_ids import Engine
from sstf.formats.lookup import find_head, target_for, target_of
from sstf.formats.published import load_any, read_any

__all__ = [
    "Engine",
    "ExportConfig",
    "export_eagle3",
    "find_head",
    "load_any",
    "read_any",
    "target_for",
    "target_of",
]
