"""The stages of a run, in order, each kept under a key made from the content of its inputs.

    <run folder>/<stage>/<key>/     what the stage wrote
    <run folder>/<stage>/<key>/config.yaml   the effective configuration
    <run folder>/<stage>/<key>/done.json     written last: the stage is finished, with its summary

Change a setting and the keys of the stages that depend on it change, so those run again and the others do not;
change it back and the old results are found again. A stage that was killed goes on in its folder.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from sstf.config import RunConfig
from sstf.config_loading import dump, load
from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.data.build import build
from sstf.data.config import JsonlSource, SampleSource
from sstf.data.conversations import SAMPLE
from sstf.data.progress import Progress
from sstf.data.tokens import TokenStore
from sstf.errors import ConfigError, DamagedDataError
from sstf.evaluation import evaluate, load_suite, write_report
from sstf.export import export_eagle3
from sstf.features import FeatureStore, extract
from sstf.methods import TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead, load_head, read_head
from sstf.targets import EMBEDDED, Target, load_target
from sstf.targets.sampling import BatchSampler
from sstf.train.trainer import Trainer

STAGES = ("data", "extract", "train", "eval", "export")
# The file that closes a stage's results. Where it was deleted, the stage runs again and makes what is missing.
RESULT = {"data": "tokens.json", "extract": "manifest.json", "train": "head/head.json", "eval": "report.json"}
NEEDS = {"data": None, "extract": "data", "train": "extract", "eval": "train", "export": "train"}
# Raised when a stage's code changes what it writes, so that results of older code are not taken for its own.
VERSIONS = {"data": 1, "extract": 1, "train": 1, "eval": 1, "export": 1}


def load_run(path: Path, overrides: list[str], progress: Progress) -> Run:
    """Read a configuration and prepare its run.

    Raises:
        ConfigError: see `config_loading.load`.
    """
    return Run(load(RunConfig, path, overrides), progress)


class Run:
    """One configured run: knows its stages' folders, and runs what is missing."""

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.method = build_method(config.method)
        self._target: Target | None = None
        self._work: dict[str, Callable[[Path], dict[str, Any]]] = {
            "data": self._data,
            "extract": self._extract,
            "train": self._train,
            "eval": self._eval,
            "export": self._export,
        }

    # ---- keys and folders -------------------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> dict[str, str]:
        """A hash for each stage: of its settings, and of the key of the stage it needs."""
        config = self.config
        settings: dict[str, Any] = {
            "data": [config.data.model_dump(mode="json"), self._target_identity(), self._source_digest()],
            "extract": [
                config.extract.model_dump(mode="json"),
                # Only what decides which states are read: another learning objective keeps the features.
                config.method.model_dump(mode="json", include={"kind", "layers"}),
            ],
            "train": [
                config.method.model_dump(mode="json"),
                config.train.model_dump(
                    mode="json", exclude={"trackers", "log_every", "keep_last", "checkpoint_every"}
                ),
                config.seed,
            ],
            "eval": [
                config.eval.model_dump(mode="json"),
                self._digests([Path(config.eval.suite)]),
                config.seed,
                # A method that is not trained needs no other stage, whose key would hold these.
                config.method.model_dump(mode="json"),
                self._target_identity(),
            ],
            "export": [config.export.model_dump(mode="json")],
        }
        keys: dict[str, str] = {}
        for stage in STAGES:
            before = self._before(stage)
            content = json.dumps([VERSIONS[stage], settings[stage], keys[before] if before else ""], sort_keys=True)
            keys[stage] = hashlib.sha256(content.encode()).hexdigest()[:12]
        return keys

    @property
    def trains(self) -> bool:
        """Whether the method has a head to train."""
        return isinstance(self.method, TrainableMethod)

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.config.folder / stage / self.keys[stage]

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage reported; None if it is not finished.

        Raises:
            DamagedDataError: `done.json` is not what was written.
        """
        done = self.folder(stage) / "done.json"
        if not done.exists() or not (self.folder(stage) / RESULT.get(stage, "")).exists():
            return None
        try:
            content: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        except ValueError:
            raise DamagedDataError(f"{done}: not valid JSON; delete it and run the same command again") from None
        return content

    def _target_identity(self) -> list[Any]:
        target = self.config.target
        local = Path(target.name).expanduser()
        weights = (
            sorted(
                (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in local.iterdir() if file.is_file()
            )
            if local.is_dir() and target.name not in EMBEDDED
            else []
        )
        return [target.model_dump(mode="json", exclude={"device"}), weights]

    def _source_digest(self) -> list[str]:
        """Content of local files, so that an edited file is a new data set."""
        source = self.config.data.source
        if isinstance(source, SampleSource):
            return [hashlib.sha256(SAMPLE.read_bytes()).hexdigest()] if SAMPLE.is_file() else []
        if not isinstance(source, JsonlSource):
            return []
        paths = source.path if isinstance(source.path, tuple) else (source.path,)
        return self._digests(paths)

    @staticmethod
    def _digests(paths: Iterable[Path]) -> list[str]:
        # A missing file is reported by the stage itself, in its own words.
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]

    # ---- running ----------------------------------------------------------------------------------------------------

    def up_to(self, *wanted: str) -> None:
        """Run the stages `wanted` and all that they need, skipping what is done.

        Raises:
            ConfigError: the method has nothing to train, or another process works in this folder.
            SstfError: a stage found its input wrong or damaged; the stages before it are kept.
        """
        if not self.trains and any(stage in ("extract", "train", "export") for stage in wanted):
            raise ConfigError(
                f"method.kind={self.config.method.kind} needs no training, so there is nothing to extract, train "
                "or export; use `sstf eval`"
            )
        order = [stage for stage in STAGES if any(stage == w or stage in self._needed(w) for w in wanted)]
        with self._lock():
            missing = [stage for stage in order if self.summary(stage) is None]
            if "eval" in missing:
                load_suite(self.config.eval.suite)  # a broken suite is known now, not after hours of training
            for stage in missing:
                folder = self.folder(stage)
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
                    leftover.unlink()
                write_bytes_atomic(folder / "config.yaml", dump(self.config).encode())
                summary = self._work[stage](folder)
                write_json_atomic(folder / "done.json", summary)

    def train_only(self) -> None:
        """The training stage in this process, one of several that a launcher started; the features must be there.

        Raises:
            ConfigError: the method has nothing to train, or the features are missing.
        """
        if not isinstance(self.method, TrainableMethod):
            raise ConfigError(f"method.kind={self.config.method.kind} needs no training")
        if self.summary("extract") is None:
            raise ConfigError("the features of this configuration are missing; run `sstf extract` with it first")
        folder = self.folder("train")
        if self.summary("train") is None:
            folder.mkdir(parents=True, exist_ok=True)
            trainer = self._trainer(folder)
            main = trainer.accelerator.is_main_process
            with self._lock() if main else nullcontext():
                summary = trainer.run(self.progress, self.config.name, self.config.model_dump(mode="json"))
                if main:
                    write_bytes_atomic(folder / "config.yaml", dump(self.config).encode())
                    write_json_atomic(folder / "done.json", summary)

    def _before(self, stage: str) -> str | None:
        return NEEDS[stage] if self.trains else None

    def _needed(self, stage: str) -> set[str]:
        before = self._before(stage)
        return {before, *self._needed(before)} if before else set()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time in a run's folder; the lock dies with its process."""
        try:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            file = (self.config.folder / ".lock").open("w")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"cannot write to {self.config.folder} ({error.strerror}); set output_dir to a folder that can be "
                "written"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another process is working in {self.config.folder}; wait for it, or set output_dir elsewhere"
                ) from None
            yield

    @property
    def target(self) -> Target:
        """The target, loaded at the first use.

        Raises:
            TargetError: it cannot be loaded.
            ConfigError: it lacks the layers that the method reads.
        """
        if self._target is None:
            t = self.config.target
            # The first time, the embedded target is also converted, which takes half a minute.
            with self.progress.start(f"loading {t.name}", 1, "target") as bar:
                target = load_target(t.name, t.dtype, t.device, t.revision, t.trust_remote_code)
                bar.advance(1)
            self.method.feature_spec(target.spec)  # checks the layers, before hours go into the target's answers
            self._target = target
        return self._target

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _data(self, folder: Path) -> dict[str, Any]:
        identity = json.dumps(self._target_identity())
        report = build(
            self.config.data, self.target.tokenizer, lambda: BatchSampler(self.target), folder, self.progress, identity
        )
        return {"conversations": report.kept, "tokens": report.tokens, "trained_tokens": report.trained_tokens}

    def _extract(self, folder: Path) -> dict[str, Any]:
        samples = TokenStore(self.folder("data")).read()
        spec = self.method.feature_spec(self.target.spec)
        extract(self.target, samples, spec, self.config.extract, folder, self.progress)
        store = FeatureStore(folder)
        self._target = None  # training needs the feature store only
        gc.collect()
        return {"conversations": len(store), "tokens": store.tokens, "layers": list(store.layers)}

    def _train(self, folder: Path) -> dict[str, Any]:
        return self._trainer(folder).run(self.progress, self.config.name, self.config.model_dump(mode="json"))

    def _trainer(self, folder: Path) -> Trainer:
        assert isinstance(self.method, TrainableMethod)
        store = FeatureStore(self.folder("extract"))
        return Trainer(store, self.method, self.config.method, self.config.train, folder, self.config.seed)

    def _eval(self, folder: Path) -> dict[str, Any]:
        path = self.folder("train") / "head" if self.trains else None
        head = load_head(path, self.target) if path else DraftHead(self.config.method.kind, self.method)
        rows = evaluate(self.target, head, self.config.eval, self.progress, self.config.seed)
        write_report(folder, rows, self.target, str(path) if path else None, self.config.eval.model_dump(mode="json"))
        keys = ("arm", "temperature", "accepted_length", "tokens_per_second", "speedup", "speedup_ci", "void")
        return {"rows": [{key: getattr(row, key) for key in keys} for row in rows if row.category == "all"]}

    def _export(self, folder: Path) -> dict[str, Any]:
        stored = read_head(self.folder("train") / "head")
        for engine in self.config.export.engines:
            export_eagle3(stored, engine, folder / engine)
        return {"engines": list(self.config.export.engines)}
