"""Heads in the forms of serving engines and other trainers: written, read back, imported."""

from sstf.formats.families import (
    FAMILIES,
    ExportConfig,
    engines_of,
    export_head,
    load_any,
    needs_target,
    read_any,
    sglang_algorithm,
    speculative_config,
)
from sstf.formats.layer_ids import Engine
from sstf.formats.lookup import find_head, target_for, target_of

__all__ = [
    "FAMILIES",
    "Engine",
    "ExportConfig",
    "engines_of",
    "export_head",
    "find_head",
    "load_any",
    "needs_target",
    "read_any",
    "sglang_algorithm",
    "speculative_config",
    "target_for",
    "target_of",
]
