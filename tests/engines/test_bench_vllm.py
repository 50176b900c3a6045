"""`sstf bench` on two real vLLM servers, the target alone and with a head: acceptance, and the same greedy answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import NEW, REPOSITORY, Learned

from sstf.formats import export_head
from sstf.methods.checkpoint import read_head

pytestmark = pytest.mark.engine


def test_a_shadow_of_plain_vllm_and_vllm_with_a_head(learned: Learned, vllm: Path, tmp_path: Path) -> None:
    """The head knows these answers by heart; in float32 its drafts must not change one of them."""
    export_head(read_head(learned.head), "vllm", tmp_path / "head")
    bodies = [{"prompt": text.prompt, "temperature": 0, "max_tokens": NEW} for text in learned.texts]
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(body) + "\n" for body in bodies))
    command = [
        *("timeout", "-k", "60", "900"),  # by SIGTERM, at which the script ends its servers
        *("scripts/bench_vllm.sh", tmp_path / "head", "--target", str(learned.target.model.name_or_path)),
        *("--dtype", "float32", "--depth", "3", "--"),
        *("--shadow", tmp_path / "recorded.jsonl", "--rounds", "2", "--json", tmp_path / "report.json"),
        *("--limit", f"requests={len(bodies)}", "--limit", "identical=0.8"),
        *(part for name in ("ttft_p95", "e2e_p50", "e2e_p95") for part in ("--limit", f"{name}=100")),
    ]
    environment = os.environ | {"SSTF_VLLM_VENV": str(vllm)}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    print("\n" + ended.stdout)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (load,) = report["loads"]
    assert report["advice"]["compared"] == len(bodies)
    assert load["baseline"]["acceptance"] is None
    accepted = load["candidate"]["acceptance"]
    assert accepted["accepted_length"] > 2.5
    assert accepted["received_length"] == pytest.approx(accepted["accepted_length"], rel=0.1)
    assert len(accepted["survival"]) == 3
    for side in ("baseline", "candidate"):
        assert load[side]["failed"] == 0
        assert load[side]["usage"]["cpu_s"] > 0
        assert load[side]["usage"]["peak_bytes"] > 1 << 28  # the model's weights
