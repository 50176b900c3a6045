"""Ray's actors make the same store, on a real Ray started here."""

from __future__ import annotations

from pathlib import Path

import pytest
from feature_samples import CONFIG, SPEC, contents, extract_to, random_samples

from sstf.data.progress import NoProgress
from sstf.errors import ConfigError, TargetError
from sstf.features import extract, own_target
from sstf.features.engines import RayEngine
from sstf.targets import Target, TargetConfig, load_configured

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sstf[ray]'", exc_type=ImportError)

# Ray's own code leaves files open, and warns of its coming versions.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("workers", [1, 2])
def test_actors_make_the_same_store(
    workers: int, tiny_target: Target, tiny_target_folder: Path, tmp_path: Path
) -> None:
    samples = random_samples()
    expected = contents(extract_to(tmp_path / "alone", tiny_target, samples))
    source = TargetConfig(name=str(tiny_target_folder), dtype="float32")
    config = CONFIG.model_copy(update={"workers": workers, "engine": RayEngine(kind="ray")})
    target = load_configured(own_target(config, source))
    assert extract(target, samples, SPEC, config, tmp_path / "ray", NoProgress(), source)
    assert contents(tmp_path / "ray") == expected
    assert not ray.is_initialized()


def test_what_an_actor_finds_wrong_is_said_here(tiny_target_folder: Path, tmp_path: Path) -> None:
    source = TargetConfig(name=str(tiny_target_folder), dtype="float32")
    config = CONFIG.model_copy(update={"workers": 1, "engine": RayEngine(kind="ray")})
    target = load_configured(own_target(config, source))
    gone = source.model_copy(update={"name": str(tmp_path / "gone")})
    with pytest.raises(TargetError, match=r"target .*gone: no config.json in"):
        extract(target, random_samples(), SPEC, config, tmp_path / "ray", NoProgress(), gone)
    nowhere = config.model_copy(update={"engine": RayEngine(kind="ray", address="127.0.0.1:9")})
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at extract.engine.address=127.0.0.1:9"):
        extract(target, random_samples(), SPEC, nowhere, tmp_path / "ray", NoProgress(), source)
