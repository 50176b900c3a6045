"""From a head's name to a decoder: what chatting and serving open alike."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from sstf.decode import AnyPolicy, Experience, SpeculativeDecoder, within
from sstf.errors import ConfigError
from sstf.formats import find_head, read_any, target_of
from sstf.methods import METHODS, DraftMethod, TrainableMethod, build_method
from sstf.methods.checkpoint import DraftHead, for_decoding
from sstf.targets import EMBEDDED, load_target
from sstf.trees import CostAwareTree


@dataclass(frozen=True)
class Opened:
    """A decoder; `drafter` is its head in words, `notes` is what its user should know."""

    decoder: SpeculativeDecoder
    drafter: str
    notes: list[str]


def open_decoder(
    name: str,
    policy: AnyPolicy | None = None,
    target_name: str | None = None,
    experience: Path | None = None,
    draft: bool = True,
) -> Opened:
    """Load a target and its head.

    Args:
        name: a head's folder, also a published one's, the folder of a run with one finished head, or a method that
            needs none.
        policy: how to draft; None takes a good one.
        target_name: in place of the target that the head names.
        experience: what decoding learned earlier, if the file exists.
        draft: False decodes plainly.

    Raises:
        SstfError: the head, the target or the experience cannot be used.
    """
    if policy and not draft:
        raise ConfigError("a policy says how to draft, which --no-draft turns off; leave out one of the two")
    learned = _load_experience(experience) if experience else Experience()
    if method := _without_head(name):
        target = load_target(target_name or next(iter(EMBEDDED)))
        head, drafter = DraftHead(name, method), f"{name}, which needs no head"
    else:
        folder = find_head(name)
        # Loaded even when nothing is drafted, so that the answers are those of the target that the head is for.
        target = target_of(folder, target_name)
        stored = read_any(folder, target.spec)
        head, drafter = for_decoding(stored, target, str(folder)), f"{folder} ({stored.config.kind})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = policy or within(head.method.limits, CostAwareTree(lookup=True))
        decoder = SpeculativeDecoder(target, head if draft else None, policy, experience=learned)
    return Opened(decoder, drafter, [str(warning.message) for warning in caught])


def _without_head(name: str) -> DraftMethod | None:
    """The method of that name, with its default settings, if it drafts untrained."""
    if name not in METHODS:
        return None
    method = build_method(METHODS[name][0]())
    return None if isinstance(method, TrainableMethod) else method


def _load_experience(path: Path) -> Experience:
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path}: cannot be written; expected a file, or a new name in an existing folder")
    return Experience.load(path) if path.exists() else Experience()
