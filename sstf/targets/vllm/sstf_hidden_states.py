"""Runs inside vLLM's own environment, as a script: hidden states for lists of token ids, one file a list.

vLLM saves hidden states through its speculative method `extract_hidden_states` and a key/value connector. Its layer i
is the output of our (0-based) layer i - 1; the last one comes before the final norm. Nothing of sstf is imported here.

Standard input, one JSON object a line: first the job, then requests `{"index": n, "tokens": [[...], ...]}`. Standard
output, one a line: `{"ready": true}`, then for every request `{"index": n, "files": [...]}` in the order of its lists,
each with `hidden_states` [seq, layer, hidden] (layers ascending) and `token_ids` [seq]. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import load_hidden_states
from vllm.platforms import current_platform


def open_engine(job: dict[str, Any]) -> LLM:
    """Load the model, ready to write the outputs of the layers asked for."""
    cpu = current_platform.is_cpu()
    return LLM(
        model=job["model"],
        revision=job["revision"],
        trust_remote_code=job["trust_remote_code"],
        dtype=job["dtype"],
        tensor_parallel_size=job["tensor_parallel"],
        gpu_memory_utilization=job["memory"],
        # One token is sampled after each text, and never read. A text's states come from one pass over it.
        max_model_len=job["longest"] + 1,
        max_num_batched_tokens=max(job["batch_tokens"], job["longest"] + 1),
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        enforce_eager=cpu,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": job["layers"]}},
        },
        kv_transfer_config=KVTransferConfig(
            kv_connector="CpuHiddenStatesConnector" if cpu else "ExampleHiddenStatesConnector",
            kv_connector_module_path="sstf_cpu_connector" if cpu else None,
            kv_role="kv_producer",
            kv_connector_extra_config={"shared_storage_path": job["scratch"]},
        ),
    )


def main() -> None:
    """Until the input ends."""
    # The engine logs to standard output, which is for answers here.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    engine = open_engine(json.loads(sys.stdin.readline()))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": tokens} for tokens in request["tokens"]]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
        files = [output.kv_transfer_params["hidden_states_path"] for output in outputs]
        for file in files:
            load_hidden_states(file)  # waits until it is written
        answer({"index": request["index"], "files": files})


if __name__ == "__main__":
    main()
