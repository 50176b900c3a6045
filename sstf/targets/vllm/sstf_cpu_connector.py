"""Runs inside vLLM's own environment: its hidden-states connector on a CPU.

vLLM's own (0.32) copies through pinned memory on a CUDA stream, and on a CPU ends with "pin_memory=True requires a CUDA
or other accelerator backend". The states are in main memory there, so they are written at once.
"""

from __future__ import annotations

import os

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class _Done:
    """A copy that is over before anybody waits for it."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Replaces the one method that needs a GPU; called once for each finished request."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        slots = torch.tensor(pending.block_ids)[:, None] * self._block_size + torch.arange(self._block_size)
        states = extract_from_kv_cache(self._kv_cache, slots.flatten(), len(pending.token_ids))
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        self._write_tensors(tensors, _Done(), pending.filename, self._lock_fds.pop(pending.req_id, None))
        self._req_copy_events[pending.req_id] = _Done()
