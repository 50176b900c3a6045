"""Speculative decoding over a stock transformers model, of one sequence or of many at once.

A step: draft a tree for every sequence, run the target once over the last emitted tokens and the trees, keep the
accepted branches, emit them with the bonus tokens. Without a head the trees are empty and the same loop is plain
decoding, so baseline and speculation differ in nothing else. A sequence that ends makes room for the next prompt.

`generate` and `generate_batch` decode what is known beforehand; in a `Session` sequences come and go between steps.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sstf.decode.adaptive import AnyPolicy, BanditPolicy, Experience, tree_policies
from sstf.decode.bandit import PLAIN, Bandit
from sstf.decode.cost import CostModel
from sstf.decode.hybrid import LONGEST, HybridDrafter
from sstf.decode.layered import LayeredPasses, open_passes
from sstf.decode.limits import refuse_beyond, within
from sstf.decode.measure import measure_costs
from sstf.decode.passes import Passes, read
from sstf.decode.stop import StopStrings
from sstf.decode.verify import (
    Verified,
    draw,
    verify_block,
    verify_deterministic,
    verify_greedy,
    verify_sampled,
    verify_traversal,
)
from sstf.errors import DecodeError
from sstf.methods import Drafter
from sstf.methods.base import News
from sstf.methods.checkpoint import DraftHead
from sstf.targets import SplitDecoder, Target
from sstf.trees import AnyTree, Chain, CostAwareTree, DraftContext, Drawing, DynamicTree, children
from sstf.types import DraftTree, SamplingParams
from sstf.warping import warp


@dataclass(frozen=True)
class Timings:
    """Seconds. `decode` covers everything after the prefill; `draft` and `verify` (the target's passes) are parts of
    it, the rest is host work. Of a sequence decoded among others, they count its time in that company."""

    prefill: float = 0.0
    decode: float = 0.0
    draft: float = 0.0
    verify: float = 0.0

    @property
    def host(self) -> float:
        """Neither drafting nor the target."""
        return self.decode - self.draft - self.verify


@dataclass(frozen=True)
class Step:
    """What one pass emitted; the first `accepted` of the tokens were among the `drafted` nodes of its tree."""

    tokens: list[int]
    accepted: int
    drafted: int


@dataclass(frozen=True)
class Generation:
    """`token_ids` are the new tokens, an end token included.

    `accepted_lengths` has one entry a verify pass: tokens it emitted, the bonus token included. The first token
    comes from the prefill, so their sum is `len(token_ids) - 1`. `ended` says why it stopped: an end token, a stop
    string, or the limit.
    """

    token_ids: list[int]
    accepted_lengths: list[int]
    timings: Timings = field(default_factory=Timings)
    ended: Literal["end", "stop", "length"] = "length"

    @property
    def accepted_length(self) -> float:
        """Mean tokens per verify pass (0 when one token was all)."""
        return sum(self.accepted_lengths) / len(self.accepted_lengths) if self.accepted_lengths else 0.0


class SpeculativeDecoder:
    """Decodes with `target`, drafting with `head` as `policy` says; `head=None` decodes plainly.

    Args:
        target: the frozen model.
        head: a method with its trained module.
        policy: a tree policy or a bandit over several; by default a chain of 4, or of what the method can draft.
        verification: of drawn trees: `sequence` decides over whole paths (block and traversal verification), `token`
            token by token. Both are lossless, the first accepts more.
        experience: what decoding learned earlier; it goes on learning.
        timed: on a GPU, wait for the device between drafting and verification, so that `Timings` tells them apart and
            cost-aware trees learn; off, a greedy step waits once, for its tokens.

    Raises:
        ConfigError: the policy asks for more than the head's method can draft.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | None = None,
        policy: AnyPolicy | None = None,
        verification: Literal["sequence", "token"] = "sequence",
        experience: Experience | None = None,
        timed: bool = True,
    ) -> None:
        self.timed = timed
        self.target, self.head, self.verification = target, head, verification
        self.policy: AnyPolicy = policy or Chain()
        if head:
            limits = head.method.limits
            if policy:
                refuse_beyond(limits, policy, f"head {head.name}")
            self.policy = _for_chains_only(within(limits, self.policy), target)
        self.experience = experience or Experience()
        self.layers = head.method.feature_spec(target.spec).layers if head else ()
        self.taps = target.tap(self.layers)
        shared = head.method.shared_layers if head else 0
        self.split = SplitDecoder(target, shared) if shared else None
        self._passes: Passes | None = None
        self.drafter = self._new_drafter()

    def forget_texts(self) -> None:
        """Draft as if nothing had been decoded before, also where earlier texts are drafted from."""
        self.drafter = self._new_drafter()

    def _new_drafter(self) -> Drafter | None:
        if not self.head:
            return None
        first = self.head.method.drafter(self.head.module, self.target.device)
        lookup = any(tree.lookup for tree in tree_policies(self.policy))
        return HybridDrafter(first, self.target.device) if lookup else first

    def generate(
        self,
        input_ids: Sequence[int] | Tensor,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_step: Callable[[Step], None] | None = None,
    ) -> Generation:
        """Continue a prompt until an end token, a stop string or `max_new_tokens`.

        Args:
            input_ids: [seq] or [1, seq] token ids.
            max_new_tokens: at most so many.
            temperature: 0 is greedy.
            top_p: nucleus sampling, in (0, 1].
            top_k: sample from so many best tokens only; 0 is off.
            seed: of the generator that sampling draws from. Unless the policy draws its trees, the text does not
                depend on what was drafted, but for rounding.
            stop: the token that completes one of these strings in the new text is the last.
            on_step: called with each pass's tokens, for streaming.

        Raises:
            DecodeError: a value out of range, a prompt that is empty or too long, or logits that are not finite.
        """
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        params = SamplingParams(temperature, top_p, top_k, max_new_tokens, seed, strings)
        report = (lambda _, step: on_step(step)) if on_step else None
        return self.generate_batch([input_ids], params, 1, report)[0]

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
        slots: int = 8,
        on_step: Callable[[int, Step], None] | None = None,
    ) -> list[Generation]:
        """Continue many prompts, `slots` of them at once, each with its own accepted length.

        Args:
            prompts: each as in `generate`.
            params: one for all, or one a prompt.
            slots: sequences decoded at once; a finished one makes room for the next prompt.
            on_step: called with the prompt's index and each pass's tokens.

        Raises:
            DecodeError: as `generate`.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if slots < 1 or len(each) != len(prompts):
            raise DecodeError(
                f"slots is {slots} and there are {len(each)} params for {len(prompts)} prompts; expected at least one "
                "slot, and params for all or for each"
            )
        requests = [_check(self.target, ids, one) for ids, one in zip(prompts, each, strict=True)]
        if not requests:
            return []
        longest = max(len(request.prompt) + request.params.max_new_tokens for request in requests)
        sequences: list[SequenceState] = []
        with self.session(min(slots, len(requests)), longest) as session:
            while len(sequences) < len(requests) or session.active:
                while len(sequences) < len(requests) and session.free:
                    index = len(sequences)
                    sequences.append(session.admit(requests[index], on_step and partial(on_step, index)))
                session.step()
        return [sequence.generation for sequence in sequences if sequence.generation]

    @contextmanager
    def session(self, slots: int, capacity: int) -> Iterator[Session]:
        """Decode sequences that come and go: at most `slots` at once, each of at most `capacity` tokens with its
        prompt. To be opened, used and left in one thread, one at a time."""
        if slots > 1 and not self.target.takes_trees:
            warnings.warn("this target's layers or attention take one sequence at a time: slots is 1", stacklevel=3)
            slots = 1
        with torch.inference_mode(), self.taps:
            try:
                yield Session(self, slots, capacity)
            except BaseException:
                # A NaN that stays in a cache spoils later texts, though masked: 0 times NaN is NaN.
                self._passes, self.drafter = None, self._new_drafter()
                raise

    def passes(self, slots: int, capacity: int) -> Passes:
        """The target's passes and cache, kept from call to call: no reallocation, and graphs stay valid."""
        if self._passes is None or self._passes.slots != slots or self._passes.capacity < capacity:
            self._passes = None  # the old cache is freed before the new one is made
            taps = self.taps if self.layers else None
            self._passes = open_passes(self.target, self.split, taps, slots, -(-capacity // 256) * 256)
        return self._passes


def _for_chains_only(policy: AnyPolicy, target: Target) -> AnyPolicy:
    """A target that cannot see a tree gets chains, and its user is told."""
    if target.takes_trees or all(isinstance(tree, Chain) and not tree.lookup for tree in tree_policies(policy)):
        return policy
    why = "keeps a recurrent state" if target.recurrent else "uses flash attention, which takes no tree mask"
    warnings.warn(
        f"target {target.spec.name} {why}: it is drafted for in chains, not trees (without lookup branches)",
        stacklevel=3,
    )
    if isinstance(policy, BanditPolicy):
        arms: dict[str, AnyTree] = {name: Chain(depth=arm.depth) for name, arm in policy.arms.items()}
        return policy.model_copy(update={"arms": arms})
    return Chain(depth=policy.depth)


@dataclass(frozen=True)
class Request:
    """A prompt that was checked, and how to continue it."""

    prompt: list[int]
    params: SamplingParams


def _check(target: Target, input_ids: Sequence[int] | Tensor, params: SamplingParams) -> Request:
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or len(ids) < 1:
        raise DecodeError(f"input_ids has shape {list(ids.shape)}; expected one sequence of at least one token")
    if params.max_new_tokens < 1:
        raise DecodeError(f"max_new_tokens is {params.max_new_tokens}; expected at least 1")
    if len(ids) + params.max_new_tokens > target.context:
        raise DecodeError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {params.max_new_tokens}, together more than the "
            f"target's context of {target.context}; shorten one of them"
        )
    if not (params.temperature >= 0 and params.temperature < float("inf")):
        raise DecodeError(f"temperature is {params.temperature}; expected 0 (greedy) or above")
    if not 0 < params.top_p <= 1:
        raise DecodeError(f"top_p is {params.top_p}; expected a value in (0, 1]")
    if params.top_k < 0:
        raise DecodeError(f"top_k is {params.top_k}; expected 0 (off) or above")
    if not all(params.stop):
        raise DecodeError("stop holds an empty string, which every text contains; remove it")
    if int(ids.min()) < 0 or int(ids.max()) >= target.spec.vocab_size:
        raise DecodeError(f"input_ids holds ids outside the target's vocabulary of {target.spec.vocab_size}")
    return Request(ids.tolist(), params)


@dataclass
class SequenceState:
    """One sequence of a session. `generation` is there once it has ended."""

    slot: int
    params: SamplingParams
    on_step: Callable[[Step], None] | None
    generator: torch.Generator
    stop: StopStrings | None
    length: int  # tokens in the target's cache; the last emitted one is not yet among them
    news: list[int]  # emitted since the last draft, and the features behind them
    features: list[Tensor]
    started: float
    prefilled: float = 0.0
    emitted: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    ended: Literal["end", "stop", "length"] | None = None
    generation: Generation | None = None

    @property
    def room(self) -> int:
        """Tokens that it may still emit."""
        return self.params.max_new_tokens - len(self.emitted)


class Session:
    """Sequences that are decoded side by side; see `SpeculativeDecoder.session`."""

    def __init__(self, decoder: SpeculativeDecoder, slots: int, capacity: int) -> None:
        self.decoder, self.target, self.capacity = decoder, decoder.target, capacity
        self.policies = tree_policies(decoder.policy) if decoder.drafter else []
        drafted = max((p.drafted_tokens for p in self.policies), default=0)
        nodes = max((p.total_tokens + (LONGEST if p.lookup else 0) for p in self.policies), default=0)
        nodes += drafted if decoder.split else 0  # drafted rows lie in the target's cache
        self.passes = decoder.passes(slots, capacity + nodes + 1)
        self.experience = decoder.experience
        # What a pass costs depends on how many share it: learned for powers of two, as the number varies.
        self.sizes = [size for size in _powers_of_two(slots) if size < slots] + [slots]
        if any(isinstance(p, CostAwareTree) for p in self.policies):
            for size in self.sizes:
                if size not in self.experience.costs:
                    costs = measure_costs(self.target, decoder.drafter, decoder.layers, size, split=decoder.split)
                    self.experience.costs[size] = costs
        if decoder.drafter:  # after the measurement, which uses it too
            shallow = self.passes if isinstance(self.passes, LayeredPasses) else None
            decoder.drafter.start(slots, capacity + drafted + 1, shallow)
        self.slots = slots
        self.active: list[SequenceState] = []  # in the order of their slots
        self.calibrates = any(isinstance(p, DynamicTree | CostAwareTree) and p.calibrated for p in self.policies)

    @property
    def free(self) -> int:
        """Sequences that there is room for."""
        return self.slots - len(self.active)

    @property
    def cost(self) -> CostModel | None:
        """Of passes as large as the next one."""
        return self.experience.costs.get(self._size)

    @property
    def bandit(self) -> Bandit | None:
        """Of passes as large as the next one."""
        if self.decoder.drafter and isinstance(self.decoder.policy, BanditPolicy):
            return self.experience.bandit(self.decoder.policy, self._size)
        return None

    @property
    def _size(self) -> int:
        return next(size for size in self.sizes if size >= len(self.active))

    # ---- the beginning and the end of a sequence --------------------------------------------------------------------

    def add(
        self,
        input_ids: Sequence[int] | Tensor,
        params: SamplingParams,
        on_step: Callable[[Step], None] | None = None,
    ) -> SequenceState:
        """Take in a prompt and emit its first token.

        Raises:
            DecodeError: as `SpeculativeDecoder.generate`, or there is no free slot, or too little room in it.
        """
        return self.admit(_check(self.target, input_ids, params), on_step)

    def admit(self, request: Request, on_step: Callable[[Step], None] | None = None) -> SequenceState:
        """`add`, of a request that was checked."""
        params, started = request.params, self._now()
        if not self.free or len(request.prompt) + params.max_new_tokens > self.capacity:
            raise DecodeError(
                f"{self.free} of {self.slots} slots are free, for {self.capacity} tokens each; expected one for "
                f"{len(request.prompt)} tokens and {params.max_new_tokens} new ones"
            )
        taken = {s.slot for s in self.active}
        slot = next(slot for slot in range(self.slots) if slot not in taken)  # the lowest: neighbours are read faster
        if self.decoder.drafter:
            self.decoder.drafter.restart(slot)
        logits, features = self.passes.prefill(slot, request.prompt)
        sequence = SequenceState(
            slot,
            params,
            on_step,
            torch.Generator().manual_seed(params.seed),
            StopStrings(self.target.tokenizer, params.stop) if params.stop else None,
            length=len(request.prompt),
            news=request.prompt[1:],
            features=[features],
            started=started,
        )
        best, ((finite,),) = logits.argmax(-1), read(logits.amax(-1).isfinite())
        if not finite:
            raise _not_finite(len(request.prompt) - 1)
        first = int(best) if params.temperature == 0 else draw(self._warp(sequence, logits), sequence.generator)
        sequence.prefilled = self._now()
        self._emit(sequence, [first], accepted=0, drafted=0)
        sequence.news.append(first)
        if sequence.ended:
            self._finish(sequence)
        else:
            self.active = sorted([*self.active, sequence], key=lambda s: s.slot)
        return sequence

    def drop(self, sequence: SequenceState) -> None:
        """End a sequence that nobody waits for any more."""
        self.active = [s for s in self.active if s is not sequence]

    def _emit(self, sequence: SequenceState, tokens: list[int], accepted: int, drafted: int) -> list[int]:
        """Emit what may be emitted: nothing after an end token, a stop string, or past the limit."""
        tokens = tokens[: sequence.room]
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.target.end_tokens), None)
        stop = sequence.stop.cut(sequence.emitted, tokens[:end]) if sequence.stop else None
        tokens = tokens[: stop or end]
        sequence.emitted += tokens
        if stop or end:
            sequence.ended = "stop" if stop and stop != end else "end"
        elif not sequence.room:
            sequence.ended = "length"
        if sequence.on_step:
            sequence.on_step(Step(list(tokens), min(accepted, len(tokens)), drafted))
        return tokens

    def _finish(self, sequence: SequenceState) -> None:
        decode = self._now() - sequence.prefilled
        prefill = sequence.prefilled - sequence.started
        sequence.generation = Generation(
            sequence.emitted,
            sequence.accepted_lengths,
            Timings(prefill, decode, sequence.draft_s, sequence.verify_s),
            sequence.ended or "length",
        )

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One pass over all sequences.

        Raises:
            DecodeError: the target or the head returned values that are not numbers; the session is of no use then.
        """
        active, t0 = self.active, self._now()
        if not active:
            return
        arm, policy = self._choose()
        trees = self._draft(policy)
        t1 = self._now()
        past = [s.length for s in active]
        slots = [s.slot for s in active]
        logits, features = self.passes.verify(slots, past, [s.emitted[-1] for s in active], trees)
        t2 = self._now()
        verified = self._verify(trees, logits, policy)
        kept = [[0, *(node + 1 for node in v.nodes)] for v in verified]
        self.passes.keep(slots, past, kept)
        emitted = 0
        for i, (s, v) in enumerate(zip(active, verified, strict=True)):
            new = self._emit(s, [*v.tokens, v.bonus], len(v.nodes), len(trees[i]))
            s.length += len(kept[i])
            s.accepted_lengths.append(len(new))
            s.news += [*v.tokens, v.bonus]
            s.features.append(features[i, kept[i]])
            s.draft_s += t1 - t0
            s.verify_s += t2 - t1
            emitted += len(new)
        self._learn(arm, policy, trees, verified, emitted, (t0, t1, t2, self._now()))
        for s in active:
            if s.ended:
                self._finish(s)
        self.active = [s for s in active if not s.ended]

    def _choose(self) -> tuple[str, AnyTree | None]:
        """The arm and its tree policy; None decodes plainly."""
        if not self.decoder.drafter or not any(s.room > 1 for s in self.active):
            return PLAIN, None
        if not (bandit := self.bandit):
            return "", self.policies[0]
        assert isinstance(self.decoder.policy, BanditPolicy)
        arm = bandit.choose()
        return arm, self.decoder.policy.arms.get(arm)

    def _draft(self, policy: AnyTree | None) -> list[DraftTree]:
        """A tree a sequence; empty for one that can emit a single token more, the bonus token."""
        trees = [DraftTree.empty(self.target.device)] * len(self.active)
        drafting = [i for i, s in enumerate(self.active) if s.room > 1]
        if policy is None or self.decoder.drafter is None or not drafting:
            return trees
        sequences = [self.active[i] for i in drafting]
        news = [
            News(s.slot, s.news, torch.cat(s.features) if len(s.features) > 1 else s.features[0]) for s in sequences
        ]
        params = sequences[0].params
        drawing = None
        if params.temperature > 0:
            generators = [s.generator for s in sequences]
            drawing = Drawing(params.temperature, params.top_p, params.top_k, generators, self.target.spec.vocab_size)
        context = DraftContext(max(s.room for s in sequences) - 1, drawing, self.experience.calibration, self.cost)
        for i, tree in zip(drafting, self.decoder.drafter.propose(news, policy, context), strict=True):
            trees[i] = tree
            self.active[i].news, self.active[i].features = [], []
        return trees

    def _verify(self, trees: list[DraftTree], logits: Tensor, policy: AnyTree | None) -> list[Verified]:
        """Walk every tree. Greedy decoding reads from the device once."""
        values, best = logits.max(-1)  # a NaN is the maximum of its row
        sizes = [len(tree) for tree in trees]
        confidences = [tree.confidence for tree in trees if tree.confidence is not None] or [values.new_empty(0)]
        found, finite, (lost,), *nodes = read(
            best,
            values.isfinite(),
            torch.cat(confidences).isnan().any(),
            *(t for tree in trees for t in (tree.tokens, tree.parents)),
        )
        rows = logits.shape[1]
        if lost:
            raise self._not_a_number()
        if not all(finite):
            self._complain(finite, rows, nodes[1::2])
        verified = []
        for i, (s, tree) in enumerate(zip(self.active, trees, strict=True)):
            here = DraftTree(torch.tensor(nodes[2 * i]), torch.tensor(nodes[2 * i + 1]))  # not on the device
            if s.params.temperature == 0:
                verified.append(verify_greedy(here, found[i * rows : i * rows + sizes[i] + 1]))
                continue
            probs = self._warp(s, logits[i, : sizes[i] + 1])
            if tree.draft_probs is None:
                verified.append(verify_deterministic(here, probs, s.generator))
            else:
                verified.append(self._sample(tree, probs, s.generator, policy))
        return verified

    def _sample(self, tree: DraftTree, probs: Tensor, generator: torch.Generator, policy: AnyTree | None) -> Verified:
        replacement = not isinstance(policy, DynamicTree | CostAwareTree | None) and policy.draw == "iid"
        if self.decoder.verification == "token":
            return verify_sampled(tree, probs, generator, replacement)
        if isinstance(policy, Chain):
            return verify_block(tree, probs, generator)
        return verify_traversal(tree, probs, generator, replacement)

    def _complain(self, finite: list[int], rows: int, parents: list[list[int]]) -> None:
        """Padding aside."""
        for i, s in enumerate(self.active):
            depth = [0]  # of every row
            for parent in parents[i]:
                depth.append(depth[parent + 1] + 1)
            for row, level in enumerate(depth):
                if not finite[i * rows + row]:
                    raise _not_finite(s.length + level)

    def _not_a_number(self) -> DecodeError:
        name = self.decoder.head.name if self.decoder.head else ""
        return DecodeError(
            f"draft head {name} returned draft probabilities that are NaN; check its weights and dtype, or decode "
            "without it"
        )

    @staticmethod
    def _warp(sequence: SequenceState, logits: Tensor) -> Tensor:
        """By the one temperature for drafted and bonus tokens alike."""
        return warp(logits, sequence.params.temperature, sequence.params.top_p, sequence.params.top_k)

    def _learn(
        self,
        arm: str,
        policy: AnyTree | None,
        trees: list[DraftTree],
        verified: list[Verified],
        emitted: int,
        times: tuple[float, float, float, float],
    ) -> None:
        t0, t1, t2, t3 = times
        if bandit := self.bandit:
            bandit.observe(arm, emitted, t3 - t0)
        if self.decoder.timed and (cost := self.cost):
            levels = self.decoder.drafter.levels if self.decoder.drafter and policy else 0
            cost.observe(levels, max(map(len, trees)), t1 - t0, t2 - t1, t3 - t2)
        if self.calibrates and isinstance(policy, DynamicTree | CostAwareTree):
            for tree, found in zip(trees, verified, strict=True):
                _observe(self.experience, tree, found)

    def _now(self) -> float:
        if self.decoder.timed and self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def _observe(experience: Experience, tree: DraftTree, found: Verified) -> None:
    """Teach the calibration: of the children of every node that was reached, the one that was emitted was right.

    The emitted token has the target's distribution, so that share is the chance of acceptance, when sampling too.
    """
    if tree.confidence is None:
        return
    tokens, confidence = tree.tokens.tolist(), tree.confidence.tolist()
    rank_of = None if tree.ranks is None else tree.ranks.tolist()
    below = children(tree.parents.tolist())
    emitted = [*found.tokens, found.bonus]
    depths: list[int] = []
    ranks: list[int] = []
    confidences: list[float] = []
    accepted: list[float] = []
    for depth, node in enumerate([-1, *found.nodes]):
        for rank, child in enumerate(below.get(node, ())):
            if confidence[child] >= 0:  # else it is not the head's
                depths.append(depth + 1)
                ranks.append(rank_of[child] if rank_of else rank)
                confidences.append(confidence[child])
                accepted.append(float(tokens[child] == emitted[depth]))
    if depths:
        experience.calibration.observe(depths, ranks, confidences, accepted)


def _not_finite(position: int) -> DecodeError:
    return DecodeError(
        f"the target returned NaN or infinite logits at position {position}; check its weights and dtype"
    )
