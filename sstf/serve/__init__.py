"""An OpenAI-compatible server over the project's own decoder."""

from sstf.serve.config import ServeConfig
from sstf.serve.server import serve

__all__ = ["ServeConfig", "serve"]
