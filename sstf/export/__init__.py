"""Writing heads in the forms that serving engines load."""

from sstf.export.eagle3 import Engine, ExportConfig, export_eagle3

__all__ = ["Engine", "ExportConfig", "export_eagle3"]
