"""Sends a published folder to a model hub, and fetches heads from it, through `huggingface_hub`.

A publication is ONE commit, so a repository holds all of it or nothing: `upload_folder` would make several. Weights are
sent before the commit and stay with the hub when the connection is cut, so the next attempt, here or by the same
command, sends only what is missing. Keys come from where `hf auth login` or HF_TOKEN put them, never from the command
line, and appear in no message.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars

from sstf.errors import DamagedDataError, HeadError, HubError
from sstf.features.store import sha256_of
from sstf.formats.files import PICKLES
from sstf.methods.checkpoint import read_head
from sstf.publish.folder import CHECKSUMS, published_files, verify_folder
from sstf.train.provenance import HIDDEN, SECRET_VALUE

# Seconds before another attempt, besides those that huggingface_hub makes for each request by itself.
WAITS = (2.0, 10.0, 30.0)
MADE_BY_THE_HUB = {".gitattributes"}  # in every repository from its start
FETCHED = (".json", ".safetensors", ".md", ".svg", ".png", ".txt")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")
# What the hub takes for OWNER/NAME.
_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,94}(?<![.-])(?<!\.git)"
NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
GIB = 2**30


class Unreachable(HubError):
    """The connection, or the hub itself, failed: the same request may work later."""


@dataclass(frozen=True)
class Fetched:
    """A head from a hub. `base_model` is what its card says, if it says."""

    folder: Path
    commit: str
    base_model: str | None


def connect(endpoint: str | None = None, anonymous: bool = False) -> HfApi:
    """The hub, with the key of this machine's user.

    Args:
        endpoint: address of the hub; None is the one that HF_ENDPOINT names, or huggingface.co.
        anonymous: reading needs no key.

    Raises:
        HubError: there is no key.
    """
    # Its warnings show addresses that are signed for a single upload.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    token = get_token()
    if token is None and not anonymous:
        raise HubError("there is no key for the hub; run `hf auth login` with one that may write, or set HF_TOKEN")
    return HfApi(endpoint=endpoint, token=token or False, library_name="sstf")


def check_name(repo: str) -> None:
    """Raises HubError for what is no OWNER/NAME."""
    if not NAME.fullmatch(repo):
        raise HubError(f"{repo!r} is no repository; expected OWNER/NAME, of letters, digits and single - _ . each")


def look(api: HfApi, repo: str, update: bool) -> bool:
    """Whether the repository is there, before hours go into what it would refuse.

    Raises:
        HubError: it holds something and `update` is not set, or the hub cannot be asked.
    """
    files = _files(api, repo)
    if files and not update:
        raise HubError(
            f"{repo} is there and holds {len(files)} files; --update adds a commit that replaces what was published "
            "there, or choose another name"
        )
    return files is not None


def send(
    api: HfApi,
    repo: str,
    folder: Path,
    update: bool = False,
    private: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> str:
    """Publish a folder that `folder.make_folder` made; the repository is made if it is not there.

    Args:
        api: the hub.
        repo: OWNER/NAME.
        folder: with its checksums.
        update: replace what an earlier publication left there. Files that it did not bring stay.
        private: of a repository that is made: others do not see it.
        note: is told of waiting and new attempts.

    Returns:
        The address of the commit.

    Raises:
        HubError: refused or not reachable; the repository is as it was, or new and empty.
    """
    names = published_files(folder)
    if not look(api, repo, update):
        with _told(repo, "make the repository"):
            api.create_repo(repo, private=private)
    for wait in (*WAITS, None):
        try:
            return _commit(api, repo, folder, names, update)
        except Unreachable as error:
            if wait is None:
                raise Unreachable(
                    f"{error}; {repo} shows nothing of it yet: run the same command again, what has arrived is not "
                    "sent twice"
                ) from None
            note(f"{error}; once more in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _commit(api: HfApi, repo: str, folder: Path, names: list[str], update: bool) -> str:
    # Read anew at every attempt: the commit before may have arrived though its answer did not.
    with _told(repo, "publish"):
        gone = sorted(set(_published_before(api, repo)) - set(names)) if update else []
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in names),
            *(CommitOperationDelete(name) for name in gone),
        ]
        message = f"{'Update' if update else 'Publish'} the head with sstf"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


def _published_before(api: HfApi, repo: str) -> list[str]:
    """Files of an earlier publication that are still there."""
    there = _files(api, repo) or []
    if CHECKSUMS not in there:
        return []
    with TemporaryDirectory() as scratch:
        listed = Path(api.hf_hub_download(repo, CHECKSUMS, local_dir=scratch))
        try:
            before = set(json.loads(listed.read_text(encoding="utf-8"))["sha256"])
        except (ValueError, KeyError, TypeError):
            return []
    return [name for name in there if name in before]


def _files(api: HfApi, repo: str) -> list[str] | None:
    """What a repository holds; None if it is not there."""
    with _told(repo, "look at"):
        try:
            found = api.model_info(repo).siblings or []
        except RepositoryNotFoundError as error:
            # A hub hides what a wrong key may not see behind the same answer.
            if error.response.status_code == 401:
                raise
            return None
    return [file.rfilename for file in found if file.rfilename not in MADE_BY_THE_HUB]


# ---- fetching --------------------------------------------------------------------------------------------------------


def fetch(api: HfApi, repo: str, revision: str | None, out: Path, note: Callable[[str], None]) -> Fetched:
    """Download a head and check every byte; `out` appears when all is there.

    Files that hold no head and no text are left, pickles above all: they can run code when they are read.

    Raises:
        HubError: not there, refused, or not reachable.
        HeadError: the repository holds no head, or one as a pickle; or `out` is taken.
        DamagedDataError: a file is not the one that the hub or the publisher names.
    """
    if out.exists():
        raise HeadError(f"{out} is there already; name another folder as --out, or delete it")
    with _told(repo, "fetch"):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        wanted = _wanted(repo, list(files))
        size = sum(files[name].size or 0 for name in wanted)
        note(f"fetching {len(wanted)} files, {size / GIB:.2f} GiB")
        partial = out.with_name(f"{out.name}.partial")  # kept when the connection is cut, to go on with
        for name in wanted:
            path = Path(api.hf_hub_download(repo, name, revision=info.sha, local_dir=partial))
            if not _is(path, files[name]):
                path.unlink()
                raise DamagedDataError(
                    f"{path}: what arrived is not what {repo} holds (its checksum differs); run the command again"
                )
    verify_folder(partial)
    if (partial / "head.json").is_file():
        read_head(partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes on what is half there
    partial.rename(out)
    named = info.card_data.get("base_model") if info.card_data else None
    return Fetched(out, str(info.sha), named if isinstance(named, str) else None)


def _wanted(repo: str, names: list[str]) -> list[str]:
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise HeadError(f"{repo} holds a file named {name!r}, which would be written outside of its folder")
    pickles = [name for name in names if name.endswith(PICKLES)]
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and pickles:
        raise HeadError(
            f"{repo} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read; ask its "
            "publisher for safetensors"
        )
    if not weights:
        raise HeadError(f"{repo} holds no head: there is no safetensors file among its {len(names)} files")
    return [name for name in names if name.endswith(FETCHED) or PurePosixPath(name).stem in LICENCES]


def _is(path: Path, listed: RepoSibling) -> bool:
    """Whether a file's content is the one that the hub lists: by SHA-256 of large files, by git's hash of others."""
    if listed.lfs is not None:
        return sha256_of(path) == listed.lfs.sha256
    content = path.read_bytes()
    return listed.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@contextmanager
def _told(repo: str, doing: str) -> Iterator[None]:
    """Errors of the client below as one sentence each."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so the hub is not asked; unset it to publish or fetch") from None
    except (RuntimeError, OSError, httpx2.HTTPError) as error:
        # Of an upload or a download, the client tells first that it failed; what went wrong is the cause.
        cause = error.__cause__ if isinstance(error, RuntimeError | LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, repo, doing) from None
        if isinstance(cause, OSError) and cause.errno in OF_THE_DISK:
            raise cause from None
        if isinstance(cause, httpx2.HTTPError | OSError | None):
            raise _unreachable(cause or error, repo, doing) from None
        raise


def _unreachable(error: BaseException, repo: str, doing: str) -> Unreachable:
    return Unreachable(f"could not {doing} {repo}: the hub cannot be reached ({_line(error)}); check the network")


def _refused(error: HfHubHTTPError, repo: str, doing: str) -> HubError:
    status, said = error.response.status_code, _line(error.server_message or "")
    because = f"{status}{': ' if said else ''}{said}"
    owner = repo.partition("/")[0]
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{repo} has no such revision ({because}); expected a branch, a tag or a commit of it")
    if status == 401:
        return HubError(
            f"could not {doing} {repo}: the hub does not take the key ({because}); run `hf auth login` with a valid "
            "one, or check the name"
        )
    if status == 403:
        return HubError(
            f"could not {doing} {repo}: the key has no right to it ({because}); use one with write rights for {owner}"
        )
    if status == 404:
        return HubError(f"{repo} is not there, or is private and the key may not see it ({because}); check the name")
    if status == 409:
        return HubError(f"{repo} is there already, or another change of it is under way ({because}); try again")
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        return HubError(f"could not {doing} {repo}: too many requests ({because}); run the same command again {when}")
    if status >= 500 or status == 408:
        return Unreachable(f"could not {doing} {repo}: the hub has a fault ({because})")
    return HubError(f"could not {doing} {repo}: the hub refuses ({because})")


def _line(said: object) -> str:
    """The first line of a message, without what looks like a key."""
    text = SECRET_VALUE.sub(HIDDEN, str(said)).strip()
    return text.splitlines()[0] if text else type(said).__name__ * (not isinstance(said, str))
