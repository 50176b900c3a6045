"""Publishing to a hub and fetching back, with the real client against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from pathlib import Path

import pytest
from hub_stand_in import READER, REPO, WRITER, Fault, Repository, StandIn, use_hub

from sstf.errors import DamagedDataError, HeadError, HubError
from sstf.publish.hub import Unreachable, check_name, connect, fetch, look, send

# The client sends files in a way that its own HTTP library means to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.safetensors")]


def quiet(text: str) -> None:
    pass


def test_what_is_published_comes_back_byte_by_byte(hub: StandIn, published: Path, tmp_path: Path) -> None:
    address = send(connect(), REPO, published)
    repository = hub.repositories[REPO]
    assert address == f"{hub.url}/{REPO}/commit/{repository.commits[-1]}"
    assert len(repository.commits) == 2, "one commit after the hub's own"
    fetched = fetch(connect(anonymous=True), REPO, None, tmp_path / "back", quiet)
    assert fetched.commit == repository.commits[-1]
    assert contents(tmp_path / "back") == contents(published)
    assert {path: content for path, content in repository.files.items() if path != ".gitattributes"} == contents(
        published
    )


def test_large_files_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, published: Path) -> None:
    hub = StandIn(part_bytes=100_000)
    use_hub(monkeypatch, tmp_path, hub.url)
    send(connect(), REPO, published)
    assert hub.repositories[REPO].files["head.safetensors"] == (published / "head.safetensors").read_bytes()
    assert hub.count(r"PUT /objects/\w+/2$") >= 1
    hub.close()


def test_a_private_repository_needs_the_key(
    hub: StandIn, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(connect(), REPO, published, private=True)
    assert hub.repositories[REPO].private
    fetch(connect(), REPO, None, tmp_path / "mine", quiet)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="does not take the key"):
        fetch(connect(anonymous=True), REPO, None, tmp_path / "theirs", quiet)


# ---- cut connections -------------------------------------------------------------------------------------------------


def test_a_cut_upload_goes_on_where_it_was(hub: StandIn, published: Path) -> None:
    """The second weight file is cut after some bytes: it alone is sent again."""
    hub.faults.append(Fault("PUT /objects/", cut=50_000, skip=1))
    send(connect(), REPO, published)
    assert hub.count("PUT /objects/") == len(weights(published)) + 1
    assert len(hub.repositories[REPO].commits) == 2


def test_the_same_command_again_sends_only_what_is_missing(hub: StandIn, published: Path) -> None:
    """The connection stays away until all attempts are used up; nothing shows. Then it is back."""
    hub.faults.append(Fault("PUT /objects/", cut=50_000, skip=1, times=1000))
    with pytest.raises(Unreachable, match="run the same command again, what has arrived is not sent twice"):
        send(connect(), REPO, published)
    assert list(hub.repositories[REPO].files) == [".gitattributes"]
    missing = [digest for digest in weights(published) if digest not in hub.objects]
    assert 0 < len(missing) < len(weights(published))
    hub.faults.clear()
    before = hub.count("PUT /objects/")
    send(connect(), REPO, published)
    assert hub.count("PUT /objects/") - before == len(missing)
    assert len(hub.repositories[REPO].commits) == 2


def test_an_answer_that_is_lost_makes_no_second_commit(hub: StandIn, published: Path) -> None:
    hub.faults.append(Fault("POST /api/models/.*/commit/", late=True))
    notes: list[str] = []
    address = send(connect(), REPO, published, note=notes.append)
    assert len(hub.repositories[REPO].commits) == 2
    assert hub.repositories[REPO].commits[-1] in address
    assert len(notes) == 1 and "once more in 2 s" in notes[0]


def test_a_fault_of_the_hub_is_waited_for(hub: StandIn, published: Path) -> None:
    hub.faults.append(Fault("POST /api/models/.*/commit/", status=503, message="busy", times=2))
    send(connect(), REPO, published)
    assert len(hub.repositories[REPO].commits) == 2


def test_a_cut_download_goes_on(hub: StandIn, published: Path, tmp_path: Path) -> None:
    send(connect(), REPO, published)
    hub.faults.append(Fault("GET /.*/resolve/.*/head.safetensors", cut=0, times=2))
    fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert contents(tmp_path / "back") == contents(published)


# ---- repositories that are there -------------------------------------------------------------------------------------


def test_an_existing_repository_is_not_touched(hub: StandIn, published: Path) -> None:
    hub.repositories[REPO] = Repository(False)
    hub.repositories[REPO].files["README.md"] = b"mine"
    with pytest.raises(HubError, match=rf"{REPO} is there and holds 1 files; --update adds a commit"):
        send(connect(), REPO, published)
    assert hub.count("POST") == 0


def test_an_update_replaces_what_was_published_and_leaves_the_rest(hub: StandIn, folder: Path) -> None:
    send(connect(), REPO, folder)
    hub.repositories[REPO].files["notes.md"] = b"mine"
    listed = json.loads((folder / "checksums.json").read_text())
    del listed["sha256"]["sglang/config.json"]
    (folder / "README.md").write_text("---\ntags: []\n---\nnew\n")
    listed["sha256"]["README.md"] = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(listed))
    before = hub.count("PUT /objects/")
    send(connect(), REPO, folder, update=True)
    files = hub.repositories[REPO].files
    assert files["README.md"].endswith(b"new\n") and files["notes.md"] == b"mine"
    assert "sglang/config.json" not in files
    assert hub.count("PUT /objects/") == before, "weights that are there are not sent again"
    assert len(hub.repositories[REPO].commits) == 3


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["head", "a/b/c", "a/", "/b", "a b/c", "a/b--c", "a/..", "a/-b", "a/b.", "a/b.git", "ä/b", "https://x/y"]
)
def test_a_name_that_is_no_repository(name: str) -> None:
    with pytest.raises(HubError, match="expected OWNER/NAME"):
        check_name(name)


@pytest.mark.parametrize("name", ["a/b", "Ann-1/my_head.v2", "a_/1"])
def test_names_of_repositories(name: str) -> None:
    check_name(name)


def test_no_key(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no key for the hub"):
        connect()


def test_a_key_that_the_hub_does_not_know(hub: StandIn, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_StolenStolenStolenStolen")
    with pytest.raises(HubError, match=r"does not take the key \(401: Invalid credentials") as raised:
        send(connect(), REPO, published)
    assert "Stolen" not in str(raised.value)


def test_a_key_that_may_only_read(hub: StandIn, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match=r"no right to it \(403: You don't have the rights.*write rights for ann"):
        send(connect(), REPO, published)
    assert REPO not in hub.repositories


def test_a_key_that_loses_its_right_half_way(hub: StandIn, published: Path) -> None:
    """The weights are refused one by one: the client reports it as the cause of a failed upload."""
    hub.faults.append(Fault("PUT /objects/", status=403, message="expired", times=100))
    with pytest.raises(HubError, match=r"\(403: expired\)"):
        send(connect(), REPO, published)
    assert list(hub.repositories[REPO].files) == [".gitattributes"]


def test_two_who_make_it_at_once(hub: StandIn, published: Path) -> None:
    hub.faults.append(Fault("POST /api/repos/create", status=409, message="You already created this model repo"))
    with pytest.raises(HubError, match="409: You already created"):
        send(connect(), REPO, published)


def test_too_many_requests(hub: StandIn, published: Path) -> None:
    hub.faults.append(Fault("POST /api/repos/create", status=429, message="slow down", headers={"Retry-After": "77"}))
    with pytest.raises(HubError, match=r"too many requests \(429: slow down\); run the same command again in 77 sec"):
        send(connect(), REPO, published)
    assert REPO not in hub.repositories


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, published: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_hub(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
    with pytest.raises(HubError, match=r"the hub cannot be reached.*check the network"):
        look(connect(), REPO, update=False)
    with pytest.raises(HubError, match="the hub cannot be reached"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


def test_offline(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        look(connect(), REPO, update=False)


def test_the_key_is_in_no_message_and_no_log(
    hub: StandIn, published: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the hub itself repeats it."""
    caplog.set_level(logging.WARNING)
    hub.faults += [
        Fault("PUT /objects/", cut=10),
        Fault("POST /api/models/.*/commit/", status=503, message=f"busy with {WRITER}"),
        Fault("POST /api/models/.*/commit/", status=418, message=f"no {WRITER}", skip=0),
    ]
    notes: list[str] = []
    with pytest.raises(HubError) as raised:
        send(connect(), REPO, published, note=notes.append)
    out, err = capfd.readouterr()
    shown = "".join([str(raised.value), *notes, caplog.text, out, err])
    assert "busy with ***" in shown and "no ***" in shown
    assert WRITER not in shown
    assert "/objects/" not in shown, "addresses that are signed for an upload stay unseen"


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there(hub: StandIn, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=f"{REPO} is not there, or is private"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)


def test_a_revision(hub: StandIn, published: Path, tmp_path: Path) -> None:
    send(connect(), REPO, published)
    first = hub.repositories[REPO].commits[1]
    repository = hub.repositories[REPO]
    repository.snapshots[first] = dict(repository.files)
    repository.commits.append("f" * 40)
    repository.files["README.md"] = b"newer"
    fetch(connect(), REPO, first, tmp_path / "old", quiet)
    assert contents(tmp_path / "old") == contents(published)
    with pytest.raises(HubError, match="has no such revision"):
        fetch(connect(), REPO, "nowhere", tmp_path / "back", quiet)


def test_pickles_are_refused(hub: StandIn, tmp_path: Path) -> None:
    hub.repositories[REPO] = Repository(False, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    with pytest.raises(HeadError, match=r"as a pickle \(pytorch_model.bin\), which can run any code"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert hub.count("resolve") == 0


def test_pickles_beside_a_head_are_left(hub: StandIn, published: Path, tmp_path: Path) -> None:
    send(connect(), REPO, published)
    hub.repositories[REPO].files |= {"optimizer.bin": b"\x80\x04", "code.py": b"import os"}
    fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert contents(tmp_path / "back") == contents(published)


def test_no_head_there(hub: StandIn, tmp_path: Path) -> None:
    hub.repositories[REPO] = Repository(False, {"README.md": b"hello"})
    with pytest.raises(HeadError, match="holds no head"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "a/../../x.json", "..\\x.json"])
def test_a_file_that_would_land_elsewhere(hub: StandIn, tmp_path: Path, name: str) -> None:
    hub.repositories[REPO] = Repository(False, {"model.safetensors": b"x", name: b"{}"})
    with pytest.raises(HeadError, match="outside of its folder"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert hub.count("resolve") == 0


def test_the_publishers_checksums_count(hub: StandIn, published: Path, tmp_path: Path) -> None:
    send(connect(), REPO, published)
    hub.repositories[REPO].files["vllm/config.json"] += b" "
    with pytest.raises(DamagedDataError, match=r"vllm/config.json: altered or cut off"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


def test_what_arrives_is_what_the_hub_lists(
    hub: StandIn, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that alters a file in transit, of the same size."""
    send(connect(), REPO, published)
    genuine = hub.repositories[REPO].files["head.json"]
    monkeypatch.setattr("hub_stand_in._Handler.send", _altering(genuine))
    with pytest.raises(DamagedDataError, match="what arrived is not what"):
        fetch(connect(), REPO, None, tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


def _altering(genuine: bytes):  # type: ignore[no-untyped-def]
    from hub_stand_in import _Handler

    send_whole = _Handler.send

    def send_altered(self, content, status=200, headers=None):  # type: ignore[no-untyped-def]
        send_whole(self, content.replace(b"eagle3", b"eagle4") if content == genuine else content, status, headers)

    return send_altered


def test_a_folder_that_is_there_is_not_written_over(hub: StandIn, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="is there already"):
        fetch(connect(), REPO, None, tmp_path, quiet)
