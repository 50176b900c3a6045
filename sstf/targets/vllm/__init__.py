"""Hidden states of a target from vLLM, which runs in an environment of its own.

vLLM pins its torch, so it is not installed beside ours: its Python is named, and a script of this folder runs there
(`sstf_hidden_states`). It computes in other kernels and other batches, so its values differ from transformers' by the
rounding of the target's dtype. `docs/extraction.md` gives the measured error.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sstf.child_process import ChildProcess
from sstf.config_loading import Section
from sstf.errors import ConfigError, TargetError, WorkerError
from sstf.targets.embedded import locate
from sstf.targets.huggingface import TargetConfig

SCRIPT = Path(__file__).with_name("sstf_hidden_states.py")


class VllmConfig(Section):
    """`python` is the interpreter of an environment with vLLM 0.18 or newer. `tensor_parallel` GPUs share the model;
    `memory` is the share of each that vLLM takes, the rest is for `lm_head`; on a CPU, of its main memory."""

    python: Path
    tensor_parallel: int = Field(default=1, ge=1)
    memory: float = Field(default=0.8, gt=0, le=1)


@dataclass(frozen=True)
class States:
    """Of one text."""

    layers: Tensor  # [seq, layer, hidden], outputs of the layers asked for, in that order
    last: Tensor  # [seq, hidden], output of the last layer, before the final norm


class VllmHiddenStates:
    """A running vLLM. Requests are answered in order; open it as a context manager.

    Args:
        config: of vLLM.
        target: which model.
        layers: 0-based decoder layers to read.
        num_layers: of the model.
        longest: tokens of the longest text.
        batch_tokens: tokens of one pass.
        scratch: an empty folder for the states on their way, of a few requests at a time.

    Raises:
        ConfigError: there is no vLLM to be started.
        WorkerError: vLLM ended while it started; its own error is in the message.
    """

    def __init__(
        self,
        config: VllmConfig,
        target: TargetConfig,
        layers: Sequence[int],
        num_layers: int,
        longest: int,
        batch_tokens: int,
        scratch: Path,
    ) -> None:
        # vLLM's layer i + 1 is the output of our layer i, and it writes them in ascending order.
        wanted = sorted({layer + 1 for layer in layers} | {num_layers})
        self._columns = torch.tensor([wanted.index(layer + 1) for layer in layers], dtype=torch.int64)
        self._written = len(wanted)
        self._answers: queue.Queue[tuple[ChildProcess, dict[str, Any] | None]] = queue.Queue()
        self._tokens: dict[int, Sequence[Sequence[int]]] = {}
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a text as long as the context, and the token that nobody reads
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        }
        try:
            self._child = ChildProcess([str(config.python), str(SCRIPT)], "vLLM", self._answers, environment)
        except OSError as error:
            raise ConfigError(
                f"extract.engine.python is {config.python}, which cannot be started ({error.strerror}); expected the "
                "python of an environment with vLLM, such as scripts/verify_vllm.sh --install-only makes"
            ) from None
        path = locate(target.name)
        self._child.send(
            {
                "model": str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path,
                "revision": target.revision,
                "trust_remote_code": target.trust_remote_code,
                "dtype": target.dtype,
                "layers": wanted,
                "longest": longest,
                "batch_tokens": batch_tokens,
                "tensor_parallel": config.tensor_parallel,
                "memory": config.memory,
                "scratch": str(scratch),
            }
        )
        try:
            self._answer()
        except BaseException:
            self._child.stop()
            raise

    def __enter__(self) -> VllmHiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.stop()

    def request(self, index: int, texts: Sequence[Sequence[int]]) -> None:
        """Ask for the states of some texts."""
        self._tokens[index] = texts
        self._child.send({"index": index, "tokens": [list(text) for text in texts]})

    def next(self) -> tuple[int, list[States]]:
        """The answer to the oldest request: its index, and the states of its texts.

        Raises:
            WorkerError: vLLM ended.
            TargetError: vLLM answered with something else than was asked for.
        """
        answer = self._answer()
        index: int = answer["index"]
        found = [
            self._read(Path(file), text) for file, text in zip(answer["files"], self._tokens.pop(index), strict=True)
        ]
        return index, found

    def _answer(self) -> dict[str, Any]:
        _, answer = self._answers.get()
        if answer is None:
            raise WorkerError(
                f"vLLM {self._child.how_it_ended()}; what it had finished is kept: correct the cause, or use "
                "extract.engine.kind=transformers, and run the command again"
            )
        return answer

    def _read(self, file: Path, text: Sequence[int]) -> States:
        try:
            tensors = load_file(file)
            states, tokens = tensors["hidden_states"], tensors["token_ids"]
        except (OSError, SafetensorError, KeyError) as error:
            raise TargetError(
                f"vLLM's hidden states in {file} cannot be read ({error}); run the command again"
            ) from None
        if tokens.tolist() != list(text) or states.shape[:2] != (len(text), self._written):
            raise TargetError("vLLM returned hidden states of other tokens or layers than were asked for")
        file.unlink()
        Path(f"{file}.lock").unlink(missing_ok=True)
        return States(states[:, self._columns], states[:, -1])
