"""A store that is read through is not held in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from feature_samples import CONFIG, extract_to, random_samples

from sstf.features import FeatureStore
from sstf.targets import Target

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of a file that this process's mappings hold in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            ours = line.endswith(str(path))
        elif ours and key == "Rss:":
            total += int(rest[0]) * 1024
    return total


@linux
def test_what_was_read_does_not_stay_resident(tiny_target: Target, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"shard_tokens": 16384})
    store = FeatureStore(extract_to(tmp_path / "store", tiny_target, random_samples(100), config))
    shard = (tmp_path / "store" / store.shards[0].file).resolve()
    held = [store[i] for i in range(len(store))]
    while_held = resident(shard)
    assert sum(len(row.input_ids) for row in held) == store.tokens
    del held
    assert while_held > 0.9 * shard.stat().st_size  # so that the measure is known to measure
    assert resident(shard) < 0.4 * shard.stat().st_size


def test_what_reads_an_uncompressed_store_does_not_import_pyarrow() -> None:
    code = "import sys, sstf.features; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
