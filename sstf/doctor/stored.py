"""Checks on a head's files, before anything is loaded: what loads and serves, and is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sstf.doctor.folder import HeadFiles
from sstf.doctor.report import Check, Question, Verdict
from sstf.targets import FrozenHead

SAME_EMBEDDING = 0.99  # cosine; random rows have about 0, the target's own rounded to bfloat16 above 0.9999

TOKENS = ("d2t", "t2d", "token_map", "mask_token")  # tensors that hold tokens, not weights

FINITE = Question(
    "head",
    "finite values",
    "every value finite",
    "The weights are spoilt: take an earlier checkpoint, or train again with a lower learning rate.",
)
DTYPES = Question(
    "head",
    "dtypes",
    "weights of 16 or 32 bits, tokens and their maps integers or flags",
    "Write the head again in bfloat16 or float32, with its vocabulary map as integers.",
)
LAYERS = Question(
    "head",
    "layer ids",
    "different layers, as many as fc reads",
    "Name every layer once (method.layers; the default repeats one on a shallow target), and train with them.",
)
VOCABULARY = Question(
    "head",
    "vocabulary map",
    "i + d2t[i] within the vocabulary, each id once, the same ids as t2d marks",
    "d2t holds offsets (target id less draft id), not target ids; write it again from t2d.nonzero().",
)
TIED = Question(
    "head",
    "tied weights",
    "lm_head is its own where the draft vocabulary is smaller",
    "Set tie_word_embeddings to false in config.json: engines would put the embeddings in lm_head's place.",
)
EMBEDDINGS = Question(
    "head",
    "embeddings",
    f"the target's rows: mean cosine of {SAME_EMBEDDING} or more",
    "Copy the target's embeddings into the checkpoint, or leave them out where the engine shares the target's.",
)


def check_files(files: HeadFiles, frozen: FrozenHead) -> list[Check]:
    """All of them, in the order of the questions above."""
    checks: tuple[Callable[[], Check], ...] = (
        lambda: _finite(files),
        lambda: _dtypes(files),
        lambda: _layers(files, frozen.final_norm.numel()),
        lambda: _vocabulary(files, len(frozen.lm_head)),
        lambda: _tied(files, len(frozen.lm_head)),
        lambda: _embeddings(files, frozen),
    )
    return [check() for check in checks]


def _finite(files: HeadFiles) -> Check:
    weights = {name: tensor for name, tensor in files.tensors.items() if tensor.is_floating_point()}
    total = sum(tensor.numel() for tensor in weights.values())
    wrong = {name: int((~tensor.float().isfinite()).sum()) for name, tensor in weights.items()}
    count = sum(wrong.values())
    where = f", in {', '.join(name for name, bad in wrong.items() if bad)}" if count else ""
    return FINITE.answer(
        "fail" if count else "pass", f"{count:,} of {total:,} values are not finite{where}", {"not_finite": count}
    )


def _dtypes(files: HeadFiles) -> Check:
    maps = {id(files.tensor(name)) for name in TOKENS}
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in files.tensors.values())
    good = {
        False: (torch.float32, torch.bfloat16, torch.float16),
        True: (torch.int64, torch.int32, torch.bool),
    }
    wrong = [name for name, tensor in files.tensors.items() if tensor.dtype not in good[id(tensor) in maps]]
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return DTYPES.answer("fail" if wrong else "pass", text + (f"; {', '.join(wrong)}" if wrong else ""))


def _layers(files: HeadFiles, hidden: int) -> Check:
    ids, fc = files.layer_ids(), files.tensor("fc.weight")
    if ids is None or fc is None:
        return LAYERS.skipped("the files name no layers" if ids is None else "there is no fc")
    # EAGLE-1 alone lets fc read the token's embedding too. It has neither a norm behind fc nor an lm_head.
    with_token = not any(files.has(name) for name in ("hidden_norm.weight", "lm_head.weight"))
    read = fc.shape[-1] / hidden - with_token
    repeated = len(ids) - len(set(ids))
    verdict: Verdict = "fail" if repeated or read != len(ids) or min(ids, default=-1) < 0 else "pass"
    text = f"layers {ids}, {repeated} of them named before; fc reads {read:g} layers of {hidden}"
    return LAYERS.answer(verdict, text, {"repeated": repeated, "named": len(ids), "read": read})


def _vocabulary(files: HeadFiles, vocab: int) -> Check:
    d2t, t2d, token_map = (files.tensor(name) for name in ("d2t", "t2d", "token_map"))
    if d2t is None and token_map is not None:  # Medusa's, which holds target ids
        d2t = token_map.long() - torch.arange(len(token_map))
    if d2t is None:
        rows = files.tensor("lm_head.weight")
        if rows is None or len(rows) == vocab:
            return VOCABULARY.answer("pass", f"no map, and none is needed for all {vocab:,} tokens")
        return VOCABULARY.answer("fail", f"no d2t, and lm_head has {len(rows):,} rows of {vocab:,}")
    tokens = d2t.long() + torch.arange(len(d2t))
    outside = int(((tokens < 0) | (tokens >= vocab)).sum())
    repeated = len(tokens) - len(tokens.unique())
    figures = {"outside": float(outside), "repeated": float(repeated)}
    text = f"{outside:,} of {len(tokens):,} ids outside the vocabulary of {vocab:,}, {repeated:,} repeated"
    differing = 0
    if t2d is not None:
        marked = t2d.bool().nonzero()[:, 0] if t2d.dtype in (torch.bool, torch.uint8) else _marked(t2d)
        differing = len(set(marked.tolist()) ^ set(tokens.tolist()))
        figures["differing"] = float(differing)
        text += f", {differing:,} unlike t2d, which marks {len(marked):,} of {len(t2d):,}"
    wrong = outside or repeated or differing or (t2d is not None and len(t2d) != vocab)
    return VOCABULARY.answer("fail" if wrong else "pass", text, figures)


def _marked(t2d: Tensor) -> Tensor:
    """The ids that a map of integers marks."""
    return t2d.nonzero()[:, 0]


def _tied(files: HeadFiles, vocab: int) -> Check:
    lm_head = files.tensor("lm_head.weight")
    flags = files.flags("tie_word_embeddings")
    if lm_head is None:
        return TIED.skipped("the head has no lm_head: it drafts with the target's")
    said = "true" if any(flags) else "false" if flags else "absent"
    text = f"lm_head has {len(lm_head):,} rows of {vocab:,}; tie_word_embeddings is {said}"
    verdict: Verdict = "fail" if len(lm_head) < vocab and any(flags) else "pass"
    return TIED.answer(verdict, text, {"rows": len(lm_head)})


def _embeddings(files: HeadFiles, frozen: FrozenHead) -> Check:
    stored = files.tensor("embed_tokens.weight")
    if stored is None:
        return EMBEDDINGS.answer("pass", "none stored: the target's are used")
    theirs = frozen.embeddings
    if stored.shape != theirs.shape:
        return EMBEDDINGS.answer("fail", f"{list(stored.shape)} stored, the target's are {list(theirs.shape)}")
    cosine = F.cosine_similarity(stored.float(), theirs.float().cpu(), dim=-1)
    used = theirs.float().cpu().abs().amax(-1) > 0  # rows of zeros, of ids that no text has, have no direction
    mean = float(cosine[used].mean())
    verdict: Verdict = "pass" if mean >= SAME_EMBEDDING else "fail"
    return EMBEDDINGS.answer(verdict, f"mean cosine {mean:.4f} with the target's", {"cosine": mean})
