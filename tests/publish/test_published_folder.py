"""The folder that goes out: what is in it, what is not, and when there is none."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub_stand_in import REPO, WRITER, StandIn
from safetensors.torch import load_file, save_file

from sstf.data.progress import NoProgress
from sstf.errors import DamagedDataError, ExportError, HeadError, SstfError, TargetError
from sstf.methods.checkpoint import read_head
from sstf.publish import folder as folder_module
from sstf.publish.folder import Publication, make_folder, verify_folder
from sstf.publish.gate import CHECKS, Candidate, Verdict, read_back
from sstf.publish.record import read_record
from sstf.targets import Target


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_it(published: Path, head: Path) -> None:
    engines = {f"{engine}/{file}" for engine in ("vllm", "sglang") for file in ("config.json", "model.safetensors")}
    own = {"README.md", "run.json", "evaluation.json", "checksums.json"}
    own |= {f"{plot}.{form}" for plot in ("acceptance", "training") for form in ("svg", "png")}
    found = names(published)
    assert own | engines | {"head.json", "head.safetensors"} <= found
    assert not [name for name in found if "optimizer" in name or name.endswith((".jsonl", ".yaml", ".tmp", ".lock"))]
    assert (published / "head.safetensors").read_bytes() == (head / "head.safetensors").read_bytes()
    assert not list(published.parent.glob(".*")), "nothing is left beside it"


def test_the_library_s_form_brings_the_embeddings(published: Path, tiny_target: Target) -> None:
    """Without them the speculators library drafts with zeros."""
    held = load_file(published / "speculators" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(held, tiny_target.frozen_head.embeddings.to(torch.bfloat16))


def test_no_path_of_this_machine(published: Path, tiny_target_folder: Path) -> None:
    for file in published.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(tiny_target_folder.parent).encode() not in content, file
            assert b"/tmp/" not in content, file
    described = json.loads((published / "head.json").read_text())
    assert described["target"]["name"] == tiny_target_folder.name


def test_what_was_recorded_is_read_back(published: Path, head: Path) -> None:
    assert read_record(published) == read_record(head).for_others()


def test_made_again_it_is_the_same(published: Path, head: Path, tmp_path: Path, quick_checks: None) -> None:
    """So that a second attempt finds its weights on the hub."""
    out = tmp_path / "again"
    make_folder(Publication(head, REPO), out, NoProgress())
    assert (out / "checksums.json").read_bytes() == (published / "checksums.json").read_bytes()
    make_folder(Publication(head, REPO, licence="mit"), out, NoProgress())
    assert "license: mit" in (out / "README.md").read_text(), "an earlier one is replaced"


def test_published_from_a_published_folder(
    published: Path, tmp_path: Path, quick_checks: None, hub: StandIn, tiny_target_folder: Path
) -> None:
    """Whoever fetched a head can publish it under another name, with its record."""
    again = Publication(published, "bob/head")
    with pytest.raises(TargetError, match="--target says where it is now"):
        make_folder(again, tmp_path / "out", NoProgress())
    assert not (tmp_path / "out").exists()
    make_folder(replace(again, target=str(tiny_target_folder)), tmp_path / "out", NoProgress())
    changed = [
        name for name in names(published) if (published / name).read_bytes() != (tmp_path / "out" / name).read_bytes()
    ]
    assert sorted(changed) == ["README.md", "checksums.json"]


def test_a_base_model_is_named(head: Path, tmp_path: Path, quick_checks: None) -> None:
    out = tmp_path / "out"
    make_folder(Publication(head, REPO, base_model="org/model"), out, NoProgress())
    assert yaml.safe_load((out / "README.md").read_text().split("---\n")[1])["base_model"] == "org/model"
    assert read_head(out).target.name == "org/model"


def test_a_folder_with_something_else_is_left_alone(head: Path, tmp_path: Path, quick_checks: None) -> None:
    (tmp_path / "thesis.md").write_text("ten years")
    with pytest.raises(ExportError, match="holds something that `sstf publish` did not write"):
        make_folder(Publication(head, REPO), tmp_path, NoProgress())
    assert names(tmp_path) == {"thesis.md"}


def test_a_key_in_the_run_is_not_published(
    head: Path, tmp_path: Path, quick_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that looks like no key, in a setting that names none."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    run = Path(shutil.copytree(head.parents[2], tmp_path / "run"))
    record = next(run.glob("train/*/run.json"))
    content = json.loads(record.read_text())
    content["starts"][-1]["config"]["data"]["source"]["path"] = WRITER
    content["starts"][-1]["config"]["name"] = "mail me"
    record.write_text(json.dumps(content))
    out = tmp_path / "out"
    make_folder(Publication(record.parent / "head", REPO), out, NoProgress())
    assert not [file for file in out.rglob("*") if file.is_file() and WRITER.encode() in file.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", "mail me")
    with pytest.raises(ExportError, match="the key that it would be sent with"):
        make_folder(Publication(record.parent / "head", REPO), tmp_path / "second", NoProgress())
    assert not (tmp_path / "second").exists()


# ---- checks ----------------------------------------------------------------------------------------------------------


def failing(candidate: Candidate, progress: object) -> list[Verdict]:
    return [Verdict("planted", False, "too low")]


def broken(candidate: Candidate, progress: object) -> list[Verdict]:
    raise HeadError("the head cannot be looked into")


def test_a_failed_check_leaves_no_folder(head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "CHECKS", (read_back, failing))
    verdicts = make_folder(Publication(head, REPO), tmp_path / "out", NoProgress())
    assert [verdict.name for verdict in verdicts if not verdict.passed] == ["planted"]
    assert names(tmp_path) == set()


def test_force_publishes_and_says_so(head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "CHECKS", (read_back, failing, broken))
    make_folder(Publication(head, REPO, force=True), tmp_path / "out", NoProgress())
    card = (tmp_path / "out/README.md").read_text()
    assert "**Published although a check failed" in card
    assert "| planted | **fail** | too low |" in card
    assert "| not all checks could be run | **fail** | the head cannot be looked into |" in card


def test_a_check_that_cannot_be_run_stops_it(head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "CHECKS", (broken,))
    with pytest.raises(HeadError, match="cannot be looked into"):
        make_folder(Publication(head, REPO), tmp_path / "out", NoProgress())
    assert names(tmp_path) == set()


@pytest.mark.slow
def test_doctor_and_parity_are_asked(published: Path, head: Path, tiny_target: Target) -> None:
    """What each finds of a sound file with a head that learned for seconds: parity holds, doctor may doubt it."""
    found = {}
    for check in CHECKS:
        found[check.__name__] = check(Candidate(published, head, tiny_target), NoProgress())
    assert list(found) == ["read_back", "doctor", "parity"]
    assert all(verdict.passed for verdict in found["read_back"])
    assert any(verdict.name == "doctor: tensors" and verdict.passed for verdict in found["doctor"])
    assert [verdict.name for verdict in found["parity"] if not verdict.passed] == []
    assert any(re.fullmatch(r"accepted length \d\.\d\d", verdict.detail) for verdict in found["parity"])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_export_that_differs_is_named(folder: Path, head: Path, tiny_target: Target, engine: str) -> None:
    weights = folder / engine / "model.safetensors"
    tensors = load_file(weights)
    tensors["fc.weight"][0, 0] += 1
    save_file(tensors, weights)
    verdicts = {verdict.name: verdict for verdict in read_back(Candidate(folder, head, tiny_target), NoProgress())}
    assert not verdicts.pop(f"form for {engine}").passed
    assert all(verdict.passed for verdict in verdicts.values())


def test_layers_off_by_one_are_named(folder: Path, head: Path, tiny_target: Target) -> None:
    path = folder / "vllm/config.json"
    config = json.loads(path.read_text())
    ids = [one - 1 for one in config["eagle_aux_hidden_state_layer_ids"]]
    config["eagle_aux_hidden_state_layer_ids"] = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = ids
    path.write_text(json.dumps(config))
    verdicts = read_back(Candidate(folder, head, tiny_target), NoProgress())
    assert [verdict.name for verdict in verdicts if not verdict.passed] == ["form for vllm"]


def test_a_damaged_head_is_not_published(head: Path, tmp_path: Path, quick_checks: None) -> None:
    run = Path(shutil.copytree(head.parents[2], tmp_path / "run"))
    weights = next(run.glob("train/*/head/head.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedDataError, match="altered or cut off"):
        make_folder(Publication(weights.parent, REPO), tmp_path / "out", NoProgress())


def test_another_target_is_refused(head: Path, tmp_path: Path, quick_checks: None, tiny_target_folder: Path) -> None:
    other = Path(shutil.copytree(tiny_target_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SstfError, match="trained for target"):
        make_folder(replace(Publication(head, REPO), target=str(other)), tmp_path / "out", NoProgress())


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_hold(folder: Path) -> None:
    verify_folder(folder)


@pytest.mark.parametrize("file", ["README.md", "head.safetensors", "vllm/config.json"])
def test_a_changed_file_is_found(folder: Path, file: str) -> None:
    with (folder / file).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(DamagedDataError, match=f"{file}: altered or cut off"):
        verify_folder(folder)
    (folder / file).unlink()
    with pytest.raises(DamagedDataError, match=f"{file}: missing"):
        verify_folder(folder)


@pytest.mark.parametrize("listed", ['{"sha256": {"../x": "0"}}', '{"sha256": {"/etc/passwd": "0"}}'])
def test_checksums_of_other_folders_are_refused(folder: Path, listed: str) -> None:
    (folder / "checksums.json").write_text(listed)
    with pytest.raises(DamagedDataError, match="outside of its folder"):
        verify_folder(folder)


@pytest.mark.parametrize("listed", ["{", "[]", '{"sha256": 3}', "{}"])
def test_checksums_that_are_none(folder: Path, listed: str) -> None:
    (folder / "checksums.json").write_text(listed)
    with pytest.raises(DamagedDataError, match="not what `sstf publish` wrote"):
        verify_folder(folder)
