"""The stages of a run, in order, each kept under a key made from the content of its inputs.

    <run folder>/<stage>/<key>/     what the stage wrote
    <run folder>/<stage>/<key>/config.yaml   the effective configuration
    <run folder>/<stage>/<key>/done.json     written last: the stage is finished, with its summary
    <run folder>/generated/<key>/            what the target wrote for the data stage, group by group

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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sstf.config import RunConfig
from sstf.config_loading import dump, load
from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.data.build import DataTarget, build, preview_samples
from sstf.data.config import JsonlSource, PackageSource, RegenerateAnswers, SampleSource
from sstf.data.conversations import SAMPLE
from sstf.data.decontamination import Decontaminator
from sstf.data.files import expand
from sstf.data.packages import PACKAGED_SETS, is_installed, packaged_file
from sstf.data.progress import Progress
from sstf.data.sampler import Sampler
from sstf.data.server import ServerSampler
from sstf.data.server_client import ServerConfig
from sstf.data.tokens import TokenStore
from sstf.errors import ConfigError, DamagedDataError, DataError, SstfError, TargetError
from sstf.evaluation import load_suite, measure, write_report
from sstf.features import (
    WHOLE,
    FeatureSource,
    FeatureStore,
    OnlineFeatures,
    Part,
    Replay,
    extract,
    own_target,
    split,
    verify,
)
from sstf.features.on_policy import argmax_share
from sstf.formats import export_head, needs_target
from sstf.methods import TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead, load_head, read_head
from sstf.parity.ladder import ParitySettings, climb
from sstf.targets import EMBEDDED, Target, load_configured
from sstf.targets.sampling import BatchSampler
from sstf.train.config import TrainConfig
from sstf.train.on_policy import accepted_length, choose_prompts, read_rollouts, roll_out, write_rollouts
from sstf.train.parallel import open_launch
from sstf.train.real_decode import RealDecode
from sstf.train.trainer import Trainer
from sstf.types import TokenSample

STAGES = ("data", "extract", "train", "eval", "export")
# The file that closes a stage's results. Where it was deleted, the stage runs again and makes what is missing.
RESULT = {"data": "tokens.json", "extract": "manifest.json", "train": "head/head.json", "eval": "report.json"}
RESULT["on_policy"] = RESULT["train"]
NEEDS: dict[str, str | None] = {"data": None, "extract": "data", "train": "extract", "eval": "train", "export": "train"}
# Where the head is trained further on its own rollouts, that head is what is taken.
NEEDS_ON_POLICY: dict[str, str | None] = {"on_policy": "train", "eval": "on_policy", "export": "on_policy"}
# Where training asks the target itself, nothing is extracted.
NEEDS_ONLINE = NEEDS | {"train": "data"}
# A lower share of trained tokens that are the target's argmax is worth a note; see docs/data.md for what was measured.
OWN_ANSWERS = 0.65
PARITY_PROMPTS = 4  # enough to tell a broken head; `sstf parity` takes more, to measure a good one
PREVIEWED = 100  # conversations that a preview of a source reads
# Raised when a stage's code changes what it writes, so that results of older code are not taken for its own.
VERSIONS = {"data": 2, "extract": 2, "train": 2, "on_policy": 1, "eval": 2, "export": 2}


@dataclass(frozen=True)
class StoreCheck:
    """What a check of one store found; `faults` are whole sentences."""

    folder: Path
    summary: str
    faults: list[str]


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
            "on_policy": self._on_policy,
            "eval": self._eval,
            "export": self._export,
        }

    # ---- keys and folders -------------------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> dict[str, str]:
        """A hash for each stage: of its settings, and of the key of the stage it needs."""
        config = self.config
        settings: dict[str, Any] = {
            "data": [
                config.data.model_dump(mode="json", exclude={"answers": {"slots", "engine"}}),
                self._engine_kind(),
                self._target_identity(),
                self._source_digest(),
                self._kept_out,
            ],
            "extract": [
                config.extract.identity(),
                # Only what decides which states are read: another learning objective keeps the features.
                config.method.model_dump(mode="json", include={"kind", *config.method.reads}),
            ],
            "train": [
                config.method.model_dump(mode="json"),
                config.train.model_dump(
                    mode="json",
                    exclude={"trackers", "log_every", "keep_last", "checkpoint_every", "batch_tokens", "parity"},
                ),
                config.seed,
                *(["online"] if self.online else []),
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
        if config.on_policy:
            settings["on_policy"] = [config.on_policy.model_dump(mode="json", exclude={"slots"})]
        keys: dict[str, str] = {}
        for stage in self.stages:
            before = self._before(stage)
            content = json.dumps([VERSIONS[stage], settings[stage], keys[before] if before else ""], sort_keys=True)
            keys[stage] = hashlib.sha256(content.encode()).hexdigest()[:12]
        return keys

    @cached_property
    def generated(self) -> Path:
        """Where the data stage keeps what the target wrote. Filters, masks and lengths of samples have no part in its
        name, so that changing them generates nothing anew."""
        data = self.config.data
        settings = data.model_dump(mode="json", exclude={"turns": True, "min_trained_tokens": True, "filters": True})
        for name in ("slots", "engine"):
            settings["answers"].pop(name, None)
        settings["near_duplicates"] = data.filters.near_duplicates
        # A turn that grows from the ids so far and one that is rendered anew are asked differently.
        parts = [settings, self._engine_kind(), data.turns == "every", self._target_identity(), self._source_digest()]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return self.config.folder / "generated" / digest

    @property
    def stages(self) -> tuple[str, ...]:
        """In order, with the one that only a section `on_policy` brings."""
        after = STAGES.index("train") + 1
        return (*STAGES[:after], "on_policy", *STAGES[after:]) if self.config.on_policy else STAGES

    @property
    def head_stage(self) -> str:
        """The stage whose head is evaluated, exported and published."""
        return "on_policy" if self.config.on_policy else "train"

    @property
    def head(self) -> Path:
        """The folder of that head."""
        return self.folder(self.head_stage) / "head"

    @property
    def trains(self) -> bool:
        """Whether the method has a head to train."""
        return isinstance(self.method, TrainableMethod)

    @property
    def online(self) -> bool:
        """Whether training computes its features itself, without the extraction stage."""
        return self.config.extract.online

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
        return [target.model_dump(mode="json", exclude={"device", "device_map"}), weights]

    def _engine_kind(self) -> str:
        answers = self.config.data.answers
        return answers.engine.kind if isinstance(answers, RegenerateAnswers) else ""

    def _source_digest(self) -> list[str]:
        """Content of local files, so that an edited file is a new data set."""
        source = self.config.data.source
        with suppress(SstfError):  # a missing file is reported by the stage itself, in its own words
            match source:
                case SampleSource():
                    return self._digests([SAMPLE])
                case PackageSource():
                    return self._digests([packaged_file(source.name)])
                case JsonlSource():
                    paths = source.path if isinstance(source.path, tuple) else (source.path,)
                    return self._digests([file for path in paths for file in expand(path)])
        return []

    @cached_property
    def _kept_out(self) -> dict[str, list[str]]:
        """The prompts that training data must not hold, by suite.

        The suite of the evaluation is not among them unless it is named: another evaluation must not mean another
        training. What it shares with the data is counted when it is run.
        """
        suites = {}
        for name in self.config.data.filters.suites:
            if name in PACKAGED_SETS and not is_installed(name):
                continue
            suites[name] = [m.content for prompt in load_suite(name) for m in prompt.messages if m.role == "user"]
        return suites

    @staticmethod
    def _digests(paths: Iterable[Path]) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]

    # ---- running ----------------------------------------------------------------------------------------------------

    def up_to(self, *wanted: str) -> None:
        """Run the stages `wanted` and all that they need, skipping what is done.

        Raises:
            ConfigError: the method has nothing to train or extract, or another process works in this folder.
            SstfError: a stage found its input wrong or damaged; the stages before it are kept.
        """
        self._check(wanted)
        order = [stage for stage in self.stages if any(stage == w or stage in self._needed(w) for w in wanted)]
        with self._lock():
            missing = [stage for stage in order if self.summary(stage) is None]
            if "eval" in missing:
                # A broken suite is known now, not after hours of training.
                load_suite(self.config.eval.suite, categories=self.config.eval.categories)
            for stage in missing:
                folder = self.folder(stage)
                folder.mkdir(parents=True, exist_ok=True)
                self._clear_up(folder)
                write_bytes_atomic(folder / "config.yaml", dump(self.config).encode())
                summary = self._work[stage](folder)
                write_json_atomic(folder / "done.json", summary)

    def extract_part(self, part: Part) -> bool:
        """A share of the features, beside the processes that make the other shares, here or on machines that share the
        run's folder. Whoever finds that no shard is missing any more closes the store.

        Returns:
            Whether the stage is done.

        Raises:
            ConfigError: nothing is to be extracted, the data stage is not done, or a whole run works in this folder.
        """
        self._check(("extract",))
        if self.summary("data") is None:
            raise ConfigError("the token ids of this configuration are missing; run `sstf data` with it once first")
        folder = self.folder("extract")
        with self._lock(shared=True) as lock:
            if self.summary("extract") is not None:
                return True
            folder.mkdir(parents=True, exist_ok=True)
            if not self._extract_shards(folder, part):
                return False
            write_bytes_atomic(folder / "config.yaml", dump(self.config).encode())
            write_json_atomic(folder / "done.json", self._extracted(folder))
            with suppress(OSError):  # another part still runs, and clears up when it ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._clear_up(folder)
        return True

    def train_only(self) -> None:
        """The training stage in this process, one of several that a launcher started; the features must be there.

        Raises:
            ConfigError: the method has nothing to train, or the features are missing.
        """
        if not isinstance(self.method, TrainableMethod):
            raise ConfigError(f"method.kind={self.config.method.kind} needs no training")
        before = NEEDS_ONLINE["train"] if self.online else NEEDS["train"]
        if before and self.summary(before) is None:
            what = "token ids" if self.online else "features"
            raise ConfigError(f"the {what} of this configuration are missing; run `sstf {before}` with it first")
        folder = self.folder("train")
        if self.summary("train") is None:
            folder.mkdir(parents=True, exist_ok=True)
            trainer = self._trainer(folder)
            main = trainer.launch.is_main
            with self._lock() if main else nullcontext():
                summary = trainer.run(self.progress, self.config.name, self.config.model_dump(mode="json"))
                del trainer  # the target wants its memory
                if main:
                    summary |= self._parity(folder / "head")
                    write_bytes_atomic(folder / "config.yaml", dump(self.config).encode())
                    write_json_atomic(folder / "done.json", summary)
        if self.config.on_policy and open_launch().is_main:
            self.progress.note("on_policy is still to be done, by one process: run `sstf on-policy` with the same file")

    def _before(self, stage: str) -> str | None:
        if not self.trains:
            return None
        needs = NEEDS_ONLINE if self.online else NEEDS
        return (needs | NEEDS_ON_POLICY if self.config.on_policy else needs)[stage]

    def _needed(self, stage: str) -> set[str]:
        before = self._before(stage)
        return {before, *self._needed(before)} if before else set()

    def _check(self, wanted: Iterable[str]) -> None:
        if not self.trains and any(stage in ("extract", "train", "on_policy", "export") for stage in wanted):
            raise ConfigError(
                f"method.kind={self.config.method.kind} needs no training, so there is nothing to extract, train "
                "or export; use `sstf eval`"
            )
        if "on_policy" in wanted and not self.config.on_policy:
            raise ConfigError(
                "this configuration has no section on_policy, so its head is trained on no rollouts; add one, such as "
                "`on_policy: {rounds: 1, steps: 200}`, or use `sstf train`"
            )
        if self.online and "extract" in wanted:
            raise ConfigError(
                "extract.online=true computes the features while the head trains, so there is nothing to extract; use "
                "`sstf train`, or set extract.online=false"
            )

    @staticmethod
    def _clear_up(folder: Path) -> None:
        for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()

    @contextmanager
    def _lock(self, shared: bool = False) -> Iterator[IO[str]]:
        """One process at a time in a run's folder, or several that share it; the lock dies with its process."""
        try:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            file = (self.config.folder / ".lock").open("a+")  # over NFS, sharing wants a readable file
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"cannot write to {self.config.folder} ({error.strerror}); set output_dir to a folder that can be "
                "written"
            ) from None
        with file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another process is working in {self.config.folder}; wait for it, or set output_dir elsewhere"
                ) from None
            yield file

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
                target = load_configured(t)
                bar.advance(1)
            self.method.feature_spec(target.spec)  # checks the layers, before hours go into the target's answers
            self._target = target
        return self._target

    # ---- looking at data ---------------------------------------------------------------------------------------------

    def samples(self) -> tuple[list[TokenSample], list[str], bool]:
        """What the data stage made: samples, the source of each, True. Before it ran: a few conversations of the source
        with the answers that they came with, and False, so that masks can be looked at before hours of generation.

        Raises:
            DataError: the source cannot be used, or has no answers of its own.
        """
        if self.summary("data") is not None:
            store = TokenStore(self.folder("data"))
            return store.read(), store.sources(), True
        found = preview_samples(self.config.data, self.target.tokenizer, PREVIEWED)
        return [sample for sample, _ in found], [source for _, source in found], False

    def data_report(self) -> dict[str, Any]:
        """What the finished data stage reported; see `data.build.DataReport`."""
        report: dict[str, Any] = json.loads((self.folder("data") / "report.json").read_text(encoding="utf-8"))
        return report

    def verify(self) -> list[StoreCheck]:
        """Check every byte of the data and feature stores of this configuration that are there."""
        checked = []
        samples = None
        if self.summary("data") is not None:
            folder = self.folder("data")
            try:
                samples = TokenStore(folder).read()
                checked.append(StoreCheck(folder, f"{len(samples):,} samples", []))
            except DamagedDataError as error:
                checked.append(StoreCheck(folder, "token ids", [str(error)]))
        folder = self.folder("extract")
        if folder.exists():
            report = verify(folder, self.progress, samples, beside=("config.yaml", "done.json"))
            summary = f"{report.conversations:,} conversations, {report.tokens:,} tokens, {report.size:,} bytes"
            checked.append(StoreCheck(folder, summary, [fault.message for fault in report.faults]))
        return checked

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _data(self, folder: Path) -> dict[str, Any]:
        tokenizer, vocabulary = self.target.tokenizer, self.target.spec.vocab_size
        target = DataTarget(tokenizer, vocabulary, self._sampler, json.dumps(self._target_identity()))
        report = build(self.config.data, target, folder, self.generated, self.progress, self._kept_out)
        return {
            "conversations": report.kept,
            "tokens": report.tokens,
            "trained_tokens": report.trained_tokens,
            "dropped": report.dropped,
        }

    def _sampler(self) -> Sampler:
        answers = self.config.data.answers
        if not isinstance(answers, RegenerateAnswers) or not isinstance(answers.engine, ServerConfig):
            return BatchSampler(self.target)
        target = self.target
        # Requests are written by the same engine, which needs room for them too.
        return ServerSampler(
            answers.engine,
            target.tokenizer,
            target.end_tokens,
            self.config.data.max_length,
            self.generated / "journal.jsonl",
            target.spec.fingerprint,
            self.progress.note,
        )

    def _extract(self, folder: Path) -> dict[str, Any]:
        self._extract_shards(folder, WHOLE)
        return self._extracted(folder)

    def _extract_shards(self, folder: Path, part: Part) -> bool:
        return self._extract_samples(TokenStore(self.folder("data")).read(), folder, part)

    def _extract_samples(self, samples: list[TokenSample], folder: Path, part: Part) -> bool:
        config = self.config
        if config.extract.elsewhere:  # other processes need the memory
            self._target = None
            gc.collect()
            target = load_configured(own_target(config.extract, config.target))
        else:
            target = self.target
        spec = self.method.feature_spec(target.spec)
        finished = extract(target, samples, spec, config.extract, folder, self.progress, config.target, part)
        self._target = None  # training needs the feature store only
        gc.collect()
        return finished

    def _extracted(self, folder: Path) -> dict[str, Any]:
        store = FeatureStore(folder)
        share = argmax_share(store)
        if share < OWN_ANSWERS:
            self.progress.note(
                f"only {share:.0%} of the trained tokens are the target's own first choice: the answers are another "
                "model's, or were drawn at a high temperature, and a head learns little from them; regenerate them"
            )
        return {
            "conversations": len(store),
            "tokens": store.tokens,
            "layers": list(store.layers),
            "argmax_share": round(share, 4),
        }

    def _train(self, folder: Path) -> dict[str, Any]:
        summary = self._trainer(folder).run(self.progress, self.config.name, self.config.model_dump(mode="json"))
        return summary | self._parity(folder / "head")

    def _parity(self, head: Path) -> dict[str, Any]:
        """The ladder without an engine: a training is complete when its head is served as it was trained.

        Raises:
            ParityError: it is not. The head is kept.
        """
        if not self.config.train.parity:
            return {}
        engines = self.config.export.chosen(self.config.method.kind)
        settings = ParitySettings(engines=engines, prompts=PARITY_PROMPTS, max_new_tokens=32)
        try:
            parity = climb(head, self.target, settings, self.config.train.precision, self.progress)
        except (TargetError, DataError) as error:  # says nothing about the head
            self.progress.note(f"parity was not checked: {error}")
            return {"parity": {"verdict": "not checked", "why": str(error)}}
        parity.require()
        self.progress.note(parity.sentence)
        return {"parity": parity.to_json()}

    def _trainer(self, folder: Path, replay: Replay | None = None, how: TrainConfig | None = None) -> Trainer:
        config, method = self.config, self.method
        assert isinstance(method, TrainableMethod)
        launch, real_decode = open_launch(), None
        if config.train.real_decode and launch.is_main:
            real_decode = RealDecode(self.target, method.positions, config.train.real_decode)
        held_out = replay.held_out if replay else None
        source = replay or self._features()
        how = how or config.train
        return Trainer(source, method, config.method, how, folder, config.seed, real_decode, launch, held_out)

    def _features(self) -> FeatureSource:
        if not self.online:
            return FeatureStore(self.folder("extract"))
        return self._computed(TokenStore(self.folder("data")).read())

    def _computed(self, samples: list[TokenSample]) -> OnlineFeatures:
        spec = self.method.feature_spec(self.target.spec)
        return OnlineFeatures(self.target, samples, spec, self.config.extract)

    def _on_policy(self, folder: Path) -> dict[str, Any]:
        """Rounds of rollouts and of training on them, each from the head of the one before. A round that is done says
        so in its folder; the last one's results become the stage's."""
        config = self.config.on_policy
        assert config is not None
        if (processes := open_launch().processes) > 1:
            raise ConfigError(
                f"on_policy lets one process decode and train, {processes} were started; run `sstf on-policy` or "
                "`sstf run` without a launcher once the training is done"
            )
        trained = self.summary("train") or {}
        head, length = self.folder("train") / "head", trained["accepted_length"]
        rounds: list[dict[str, Any]] = []
        for number in range(1, config.rounds + 1):
            here = folder / f"round-{number}"
            done = here / "done.json"
            if not done.exists():
                write_json_atomic(done, self._round(here, number, head))
            found = json.loads(done.read_text(encoding="utf-8")) | {"accepted_length_before": length}
            head, length = here / "head", found["accepted_length"]
            rounds.append(found)
        for name in ("run.json", "metrics.jsonl"):  # of the head that is there, for its record
            if (last := head.parent / name).exists():
                write_bytes_atomic(folder / name, last.read_bytes())
        (folder / "head").mkdir(exist_ok=True)
        for name in ("head.safetensors", "head.json"):  # the latter last: it says that the head is there
            write_bytes_atomic(folder / "head" / name, (head / name).read_bytes())
        before = rounds[0]["accepted_length_before"]
        if length is not None:
            self.progress.note(f"on-policy: accepted length {before:.3f} -> {length:.3f} on held-out text")
        summary: dict[str, Any] = rounds[-1] | {"accepted_length_before": before, "rounds": rounds}
        return summary | self._parity(folder / "head")

    def _round(self, folder: Path, number: int, head: Path) -> dict[str, Any]:
        config, method, seed = self.config.on_policy, self.method, self.config.seed
        assert config is not None and isinstance(method, TrainableMethod)
        ordinary = self._features()
        training, held_out = split(ordinary, self.config.train.validation_conversations, seed)
        rollouts = read_rollouts(folder / "rollouts")
        if rollouts is None:
            prompts = choose_prompts(ordinary, training, config, number, seed, self.target.context)
            depth, drafter = config.depth or method.positions, load_head(head, self.target)
            drawn = seed * 1_000_003 + number
            rollouts = roll_out(self.target, drafter, prompts, depth, config, drawn, self.progress)
            write_rollouts(folder / "rollouts", rollouts)
            del drafter
        samples = [rollout.sample for rollout in rollouts]
        played: FeatureSource
        if self.online:
            played = self._computed(samples)
        else:
            self._extract_samples(samples, folder / "features", WHOLE)
            played = FeatureStore(folder / "features")
        anchors = [rollout.anchors for rollout in rollouts]
        replay = Replay(played, anchors, ordinary, held_out, method.positions, config.decay, config.weight)
        trainer = self._trainer(folder, replay, config.training(self.config.train, head))
        summary = trainer.run(self.progress, self.config.name, self.config.model_dump(mode="json"))
        return summary | {
            "rollouts": len(rollouts),
            "rollout_tokens": sum(sum(sample.loss_mask) for sample in samples),
            "rollout_accepted_length": round(accepted_length(rollouts), 4),
            "rejected_passes": sum(anchor.rejected is not None for passes in anchors for anchor in passes),
        }

    def _eval(self, folder: Path) -> dict[str, Any]:
        path = self.head if self.trains else None
        head = load_head(path, self.target) if path else DraftHead(self.config.method.kind, self.method)
        seen = self._seen_in_training()
        found = measure(self.target, head, self.config.eval, self.progress, self.config.seed)
        write_report(
            folder,
            found,
            self.target,
            str(path) if path else None,
            self.config.eval.model_dump(mode="json"),
            self.progress.note,
        )
        keys = ("arm", "temperature", "accepted_length", "tokens_per_second", "speedup", "speedup_ci", "void")
        return {
            "rows": [{key: getattr(row, key) for key in keys} for row in found.rows if row.category == "all"],
            "conversations_with_its_prompts": seen,
        }

    def _seen_in_training(self) -> int:
        """How many training conversations hold a prompt of the evaluation's suite; more than none deserves a note."""
        if not self.trains:
            return 0
        config = self.config.eval
        prompts = load_suite(config.suite, config.prompts, config.categories)
        index = Decontaminator({"": [m.content for prompt in prompts for m in prompt.messages if m.role == "user"]})
        # Not `splitlines`: JSON allows U+2028 and its like within a text.
        rows = (self.folder("data") / "conversations.jsonl").read_text(encoding="utf-8").split("\n")
        items = (json.loads(row) for row in rows if row)
        texts = ([m["content"] for m in item.get("messages", [])] or [item.get("text", "")] for item in items)
        seen = sum(index.match_any(own) is not None for own in texts)
        if seen:
            self.progress.note(
                f"{seen} training conversations hold a prompt of {self.config.eval.suite}: its figures flatter the "
                "head; name the suite in data.filters.suites to train without them"
            )
        return seen

    def _export(self, folder: Path) -> dict[str, Any]:
        stored = read_head(self.head)
        engines = self.config.export.chosen(stored.config.kind)
        if not engines:
            self.progress.note(f"no engine here knows method {stored.config.kind}: there is nothing to export")
        for engine in engines:
            frozen = self._features().frozen_head() if needs_target(stored.config.kind, engine) else None
            for sentence in export_head(stored, engine, folder / engine, frozen=frozen):
                self.progress.note(sentence)
        return {"engines": list(engines)}
