"""The commands as typed: what they print, their exit codes, and that no key is ever shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_stand_in import READER, REPO, WRITER, StandIn

from sstf.cli import main
from sstf.publish import folder as folder_module
from sstf.publish.gate import Candidate, Verdict

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Typed:
    """Runs a command; keeps all that any command showed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd, self.shown = capfd, ""

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = self.capfd.readouterr()
        self.shown += out + err
        assert WRITER not in self.shown and READER not in self.shown
        assert "Traceback" not in self.shown
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.chdir(tmp_path)
    return Typed(capfd)


def one_sentence(err: str) -> str:
    # Bars of the libraries below are off in a process of its own; here they were imported before.
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("Loading weights")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_from_a_run_to_a_hub_and_back(
    typed: Typed, hub: StandIn, quick_checks: None, run_config: Path, head: Path, tiny_target_folder: Path
) -> None:
    code, out, _ = typed("publish", run_config, "--repo", REPO, "--license", "mit")
    assert code == 0, out
    assert f"published      {hub.url}/{REPO}/commit/{hub.repositories[REPO].commits[-1]}" in out
    assert "pass head: whole" in out and "folder         published/tiny-head" in out
    code, out, _ = typed("pull", REPO, "--out", "mine")
    assert code == 0
    assert "head           mine" in out and f"target         {tiny_target_folder.name} (float32, " in out
    assert (Path("mine") / "head.safetensors").read_bytes() == (head / "head.safetensors").read_bytes()
    card = Path("mine/evaluation.json")
    report = json.loads(card.read_text())
    report["hardware"]["processor"] = "another"  # here, a speed says nothing: others use this machine
    card.write_text(json.dumps(report))
    suite = run_config.parent / "suite.jsonl"
    code, out, _ = typed("reproduce", "mine/README.md", "--target", tiny_target_folder, "--suite", suite)
    assert code == 0, out
    assert "2 of 2 figures are within the card's tolerance" in out


def test_reproduce_out_of_tolerance(typed: Typed, folder: Path, run_config: Path, tiny_target_folder: Path) -> None:
    card = folder / "evaluation.json"
    report = json.loads(card.read_text())
    for row in report["rows"]:
        row["accepted_length"], row["accepted_length_ci"] = 2.9, [2.8, 3.0]
    report["hardware"]["processor"] = "another"
    card.write_text(json.dumps(report))
    suite = run_config.parent / "suite.jsonl"
    code, out, _ = typed("reproduce", folder, "--target", tiny_target_folder, "--suite", suite)
    assert code == 1
    assert "0 of 2 figures are within the card's tolerance" in out


def test_dry_run_needs_no_hub_and_no_key(
    typed: Typed, quick_checks: None, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, _ = typed("publish", head, "--repo", REPO, "--dry-run", "--out", "here")
    assert code == 0
    assert "folder         here" in out and Path("here/README.md").is_file()
    assert "published  " not in out


def test_a_failed_check_is_exit_code_1(typed: Typed, hub: StandIn, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(candidate: Candidate, progress: object) -> list[Verdict]:
        return [Verdict("doctor: layers", False, "best at -1")]

    monkeypatch.setattr(folder_module, "CHECKS", (planted,))
    code, out, err = typed("publish", head, "--repo", REPO)
    assert code == 1
    assert "FAIL doctor: layers: best at -1" in out
    assert "a check failed, so nothing was published" in one_sentence(err)
    assert REPO not in hub.repositories and not Path("published/tiny-head").exists()
    code, _, _ = typed("publish", head, "--repo", REPO, "--force")
    assert code == 0 and REPO in hub.repositories


def test_what_the_hub_refuses_is_known_before_the_checks(
    typed: Typed, hub: StandIn, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(candidate: Candidate, progress: object) -> list[Verdict]:
        raise AssertionError("checks were run")

    monkeypatch.setattr(folder_module, "CHECKS", (never,))
    monkeypatch.setenv("HF_TOKEN", "hf_StolenStolenStolenStolen")
    code, _, err = typed("publish", head, "--repo", REPO)
    assert code == 2 and "does not take the key (401" in one_sentence(err)
    code, _, err = typed("publish", head, "--repo", "nothing")
    assert code == 2 and "expected OWNER/NAME" in one_sentence(err)
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = typed("publish", head, "--repo", REPO)
    assert code == 2 and "no key for the hub" in one_sentence(err)


def test_a_key_without_rights(
    typed: Typed, hub: StandIn, quick_checks: None, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    code, _, err = typed("publish", head, "--repo", REPO)
    assert code == 2 and "the key has no right to it (403" in one_sentence(err)
    assert REPO not in hub.repositories


def test_what_is_no_head(typed: Typed, hub: StandIn, tmp_path: Path) -> None:
    code, _, err = typed("publish", tmp_path, "--repo", REPO, "--dry-run")
    assert code == 2 and "no head there" in one_sentence(err)
    code, _, err = typed("pull", REPO)
    assert code == 2 and f"{REPO} is not there" in one_sentence(err)
    code, _, err = typed("reproduce", tmp_path)
    assert code == 2 and "no head there" in one_sentence(err)


def test_a_run_that_is_not_trained(typed: Typed, hub: StandIn, run_config: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(run_config, tmp_path / "other.yaml"))
    other.write_text(other.read_text().replace("name: tiny\n", "name: tiny\nseed: 5\n").replace("/run\n", "/not\n"))
    code, _, err = typed("publish", other, "--repo", REPO, "--dry-run")
    assert code == 2 and "its head is not trained yet; run `sstf run" in one_sentence(err)
