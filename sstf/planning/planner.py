"""Makes the plan of a run: what each stage needs and how long it takes, from the configuration, a sample of the data
and a short calibration. Nothing of the run's own is written.

Stages that are done count as nothing to do, and a finished data stage gives its exact figures. Time is that of one
device; several processes divide extraction and training between them.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import torch

from sstf.config import RunConfig
from sstf.data.config import InProcess, RegenerateAnswers, SelfWrittenSource
from sstf.data.progress import Progress
from sstf.data.tokens import TokenStore
from sstf.errors import TargetError
from sstf.evaluation import load_suite
from sstf.evaluation.config import NGRAM, PLAIN
from sstf.features.engines import VllmEngine
from sstf.features.shards import threads_for
from sstf.features.spec import HiddenSignal, TeacherSignal, TopKSignal
from sstf.machine import device_memory, free_disk, resident_memory
from sstf.methods import TrainableMethod
from sstf.pipeline import Run
from sstf.planning import sizes
from sstf.planning.advice import advise
from sstf.planning.calibrate import SECONDS, SHARES, Calibration, calibrate
from sstf.planning.interval import Interval
from sstf.planning.known_runs import Shape, expected, known_runs
from sstf.planning.plan import DiskPart, Expected, Plan, StageTime
from sstf.planning.sizes import Form, StageMemory
from sstf.planning.volume import SAMPLE, Look, Volume, look, volume, volume_of
from sstf.targets import load_configured
from sstf.targets.outline import TargetOutline, outline
from sstf.train.memory import Part, frozen_bytes, trained
from sstf.train.on_policy import OnPolicyConfig
from sstf.trees import Chain

TEXT_COPIES = 2  # the conversations, and the groups that regeneration resumes from
ID_BYTES = 7  # a token id in such a group, written as JSON


def make_plan(run: Run, progress: Progress, measure: bool = True, seconds: float = SECONDS) -> Plan:
    """Plan a run.

    Args:
        run: The configured run; nothing is written to its folder.
        progress: Shows the steps.
        measure: Whether to calibrate; without it the target's weights are not loaded.
        seconds: For the calibration.

    Raises:
        SstfError: what the run itself would say about its source, target or suite.
    """
    config, method = run.config, run.method
    load_suite(config.eval.suite)  # a broken suite is known now
    device = _device(config)
    before = resident_memory() if device.type == "cpu" else 0
    shape = outline(config.target)
    layers = len(method.feature_spec(shape.spec).layers)
    done = {stage for stage in run.stages if run.summary(stage) is not None}
    with progress.start("looking at the data", 1, "source") as bar:
        seen, data = _data(run, shape, "data" in done)
        bar.advance(1)
    available, spread = device_memory(device), config.target.device_map is not None
    needed = _to_measure(run, done)
    measured: Calibration | None = None
    if measure and needed and (spread or sizes.weight_bytes(shape.spec, shape.parameters) < available):
        with progress.start(f"calibrating ({seconds:.0f} s)", 1, "calibration") as bar:
            measured = calibrate(config, load_configured(config.target), method, seen, needed, seconds)
            bar.advance(1)
        if measured.writing is not None:
            data = volume(seen, config.data, measured.writing.answer, measured.writing.request)
    head = _head(run, shape)
    signal = config.extract.teacher
    chosen = (config.extract.codec, signal.kind, config.extract.compression)
    forms: list[Form] = []
    if data is not None:
        signals: dict[str, TeacherSignal] = {"hidden": HiddenSignal(), "topk": TopKSignal()}
        signals[signal.kind] = signal
        packed = {(codec, str(signal.kind)): share for codec, share in (measured or Calibration()).packed.items()}
        forms = sizes.forms(shape.spec, layers, signals, data.mask_share, packed)
    plan = Plan(
        name=config.name,
        target=shape.spec.name,
        parameters=shape.parameters,
        method=config.method.kind,
        device=str(device),
        spread=spread,
        data=data,
        forms=forms,
        form=chosen,
        usual_bytes=sizes.usual_bytes(shape.spec),
        online=run.online,
        disk=_disk(run, shape, head, data, forms, chosen, done),
        folder=str(config.folder),
        disk_free=free_disk(config.folder),
        memory=_beside(before, _memory(run, shape, head, data, done, device, available - before)),
        memory_available=available,
        slots_that_fit=_slots_that_fit(config, shape, data, available - before)
        if data is not None and _writes_here(config)
        else None,
        times=_times(run, data, measured, done),
        expected=_expected(run, shape, data),
        calibration=measured,
    )
    draft_vocab = min(method.draft_vocab_size, shape.spec.vocab_size) if isinstance(method, TrainableMethod) else None
    return replace(plan, advice=tuple(advise(plan, config, shape.spec, draft_vocab)))


def _data(run: Run, shape: TargetOutline, done: bool) -> tuple[Look, Volume | None]:
    if not run.trains:
        return Look(0, [], [], [], 0.0, 0.0), None
    config = run.config.data
    if not done:
        seen = look(config, shape.tokenizer, run.config.seed)
        return seen, volume(seen, config)
    samples = TokenStore(run.folder("data")).read()
    texts = run.folder("data") / "conversations.jsonl"
    found = volume_of(samples, texts.stat().st_size if texts.exists() else 0)
    some = random.Random(run.config.seed).sample(samples, min(SAMPLE, len(samples)))
    return Look(len(samples), [], some, [], 0.0, 0.0), found


def _device(config: RunConfig) -> torch.device:
    """As `load_target` chooses it."""
    if config.target.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=config.target.device).device
    except (RuntimeError, AssertionError) as error:
        raise TargetError(
            f"target.device is {config.target.device!r}, which this machine or this build of torch does not have"
        ) from error


def _head(run: Run, shape: TargetOutline) -> torch.nn.Module | None:
    """The head without memory, to count its parameters."""
    if not isinstance(run.method, TrainableMethod):
        return None
    with torch.device("meta"):
        tokens = torch.arange(min(run.method.draft_vocab_size, shape.spec.vocab_size))
        return run.method.build_head(shape.spec, shape.frozen, tokens)


def _writes_here(config: RunConfig) -> bool:
    """Whether the target writes answers in this process; how fast a server does it is not ours to measure."""
    return isinstance(config.data.answers, RegenerateAnswers) and isinstance(config.data.answers.engine, InProcess)


def _second(run: Run, done: set[str]) -> OnPolicyConfig | None:
    """The on-policy phase, if the run has one and it is still to run."""
    return None if "on_policy" in done else run.config.on_policy


def _to_measure(run: Run, done: set[str]) -> list[str]:
    wanted = {
        "regeneration": run.trains and _writes_here(run.config) and "data" not in done,
        "extraction": run.trains and not run.online and "extract" not in done,
        "training": run.trains and ("train" not in done or _second(run, done) is not None),
        "rollouts": _second(run, done) is not None,
        "evaluation": "eval" not in done,
    }
    if wanted["training"] and not run.online:
        wanted["extraction"] = True  # which makes what is trained on
    return [stage for stage in SHARES if wanted[stage]]


# ---- disk and memory -------------------------------------------------------------------------------------------------


def _disk(
    run: Run,
    shape: TargetOutline,
    head: torch.nn.Module | None,
    data: Volume | None,
    forms: Sequence[Form],
    chosen: tuple[str, str, str],
    done: set[str],
) -> list[DiskPart]:
    """What is still to be written."""
    if head is None or data is None:
        return []
    config, tokens, parts = run.config, data.tokens, list[DiskPart]()
    if "data" not in done:
        text = None
        if tokens is not None and data.conversations is not None:
            # What the target writes has about as many bytes of text a token as ids have of JSON.
            written = data.written.times(2 * ID_BYTES) if data.written else Interval.exact(0.0)
            texts = Interval.exact(TEXT_COPIES * data.text_bytes_each * data.conversations)
            text = tokens.times(5) + texts + written
        parts.append(DiskPart("conversations and tokens", text))
    size = next((f.bytes_per_token for f in forms if (f.codec, f.teacher, f.compression) == chosen), None)
    # Where compression was not measured, it is taken to save nothing.
    each = size or next(
        f.bytes_per_token or 0.0 for f in forms if (f.codec, f.teacher, f.compression) == (*chosen[:2], "none")
    )
    if "extract" not in done and not run.online:
        parts.append(DiskPart("features", tokens.times(each) if tokens else None))
        parts.append(DiskPart("frozen parts of the target", Interval.exact(frozen_bytes(shape.frozen))))
    if "train" not in done:
        parameters = sizes.parameters_of(head)
        # A new checkpoint is whole before an old one goes.
        count = config.train.keep_last + 1
        parts.append(DiskPart(f"checkpoints ({count})", Interval.exact(count * sizes.checkpoint_bytes(parameters))))
        exported = 4 + 2 * len(config.export.chosen(config.method.kind))
        parts.append(DiskPart("head, and its exports", Interval.exact(exported * parameters)))
    if second := _second(run, done):
        rounds, played = second.rounds, _played(second, data)
        if not run.online:
            parts.append(DiskPart("features of rollouts", played.times(each * rounds) if played else None))
        parameters = sizes.parameters_of(head)
        kept = (config.train.keep_last + 1) * sizes.checkpoint_bytes(parameters) + 4 * parameters
        parts.append(DiskPart(f"checkpoints and heads of rounds ({rounds})", Interval.exact(rounds * kept)))
    return parts


def _memory(
    run: Run,
    shape: TargetOutline,
    head: torch.nn.Module | None,
    data: Volume | None,
    done: set[str],
    device: torch.device,
    free: int,
) -> list[StageMemory]:
    """Of the stages that are still to run, beside what the process holds before."""
    config, spec, found = run.config, shape.spec, list[StageMemory]()
    layers = len(run.method.feature_spec(spec).layers)
    if head is not None and data is not None:
        assert isinstance(run.method, TrainableMethod)
        if "data" not in done and _writes_here(config):
            found.append(_regeneration(config, shape, data, _slots(config)))
        # One conversation can be longer than a batch is meant to be.
        rows = max(config.extract.batch_tokens, data.longest)
        if "extract" not in done and not run.online:
            threads = threads_for(device.type)
            found.append(sizes.extraction(spec, shape.parameters, layers, rows, config.extract.shard_tokens, threads))
        second = _second(run, done)
        if "train" not in done or second:  # a round of the second phase trains as the first one did
            stage = _training(run, shape, head, data, device, free)
            if run.online:
                stage = sizes.with_target(stage, spec, shape.parameters, rows, layers)
            found.append(stage)
        if second:
            own, rows = sizes.parameters_of(head), 1 + (second.depth or run.method.positions)
            capacity = min(data.longest + second.max_new_tokens, spec.max_position_embeddings)
            found.append(sizes.decoding("rollouts", spec, shape.parameters, own, second.slots, capacity, rows))
    if "eval" not in done:
        parameters = sizes.parameters_of(head) if head is not None else 0
        capacity = config.eval.max_new_tokens + 256
        found.append(sizes.decoding("evaluation", spec, shape.parameters, parameters, 1, capacity, 1))
    return found


def _beside(base: int, stages: list[StageMemory]) -> list[StageMemory]:
    if not base:
        return stages
    return [StageMemory(stage.stage, (Part("Python and libraries", base), *stage.parts)) for stage in stages]


def _training(
    run: Run, shape: TargetOutline, head: torch.nn.Module, data: Volume, device: torch.device, free: int
) -> StageMemory:
    assert isinstance(run.method, TrainableMethod)
    taps = shape.spec.hidden_size * len(run.method.feature_spec(shape.spec).layers)
    what = trained(head, shape.frozen, taps, run.method.unrolls, data.mask_share, run.config.train, device)
    return sizes.training(what, data.longest, run.config.train, run.method.loss_rows, free)


def _slots(config: RunConfig) -> int:
    """Rows that the target writes at once."""
    answers, source = config.data.answers, config.data.source
    assert isinstance(answers, RegenerateAnswers)
    return max(answers.slots, source.slots) if isinstance(source, SelfWrittenSource) else answers.slots


def _regeneration(config: RunConfig, shape: TargetOutline, data: Volume, slots: int) -> StageMemory:
    answers, capacity = config.data.answers, config.data.max_length
    assert isinstance(answers, RegenerateAnswers)
    prompt = min(capacity, max(1, data.longest - answers.max_new_tokens))
    return sizes.regeneration(shape.spec, shape.parameters, slots, capacity, prompt)


def _slots_that_fit(config: RunConfig, shape: TargetOutline, data: Volume, room: float) -> int:
    """The most slots whose regeneration takes at most `room` bytes; 0 if not even one does."""
    slots = range(1, _slots(config) + 1)
    return bisect_right(slots, room, key=lambda n: _regeneration(config, shape, data, n).bytes)


# ---- time and acceptance ---------------------------------------------------------------------------------------------


def _times(run: Run, data: Volume | None, measured: Calibration | None, done: set[str]) -> list[StageTime]:
    found, figures = [], measured or Calibration()
    if data is not None:
        found.append(_data_time(run, data, figures))
        if not run.online:
            found.append(_extract_time(run, data, figures))
        found.append(_train_time(run, data, figures))
        if run.config.on_policy:
            found.append(_on_policy_time(run, run.config.on_policy, data, figures))
    found.append(_eval_time(run, figures))
    return [StageTime(t.stage, "done", "", Interval.exact(0.0)) if t.stage in done else t for t in found]


def _data_time(run: Run, data: Volume, measured: Calibration) -> StageTime:
    if not isinstance(run.config.data.answers, RegenerateAnswers):
        return StageTime("data", "answers are kept", "reading and rendering only", Interval.exact(0.0))
    work = "unknown amount of data" if data.written is None else f"{_count(data.written)} tokens written"
    writing = measured.writing
    if writing is None or data.written is None or data.prompts is None:
        how = "not measured" if _writes_here(run.config) else "a server's speed is not measured"
        return StageTime("data", work, how, None)
    seconds = data.prompts.times(1 / writing.reading.per_second) + data.written.times(1 / writing.writing.per_second)
    return StageTime("data", work, f"{writing.writing.per_second:,.0f} tokens/s", seconds.times(1 / 3600))


def _extract_time(run: Run, data: Volume, measured: Calibration) -> StageTime:
    work = "unknown amount of data" if data.tokens is None else f"{_count(data.tokens)} tokens"
    if isinstance(run.config.extract.engine, VllmEngine):
        return StageTime("extract", work, "vLLM's speed is not measured", None)
    if measured.extraction is None or data.tokens is None:
        return StageTime("extract", work, "not measured", None)
    rate = measured.extraction.per_second
    return StageTime("extract", work, f"{rate:,.0f} tokens/s", data.tokens.times(1 / rate / 3600))


def _train_time(run: Run, data: Volume, measured: Calibration) -> StageTime:
    config = run.config.train
    if config.steps is not None:
        # Batches are seldom quite full.
        tokens: Interval | None = Interval.exact(config.steps * config.step_tokens)
        work = f"{config.steps:,} steps of up to {config.step_tokens:,} tokens"
    else:
        assert config.epochs is not None
        tokens = data.tokens and data.tokens.times(config.epochs)
        work = "unknown amount of data" if tokens is None else f"{_count(tokens)} tokens, {config.epochs} epochs"
    if measured.training is None or tokens is None:
        return StageTime("train", work, "not measured", None)
    rate = measured.training.per_second
    seconds = tokens.times(1 / rate)
    if measured.validation is not None:
        steps = config.steps or math.ceil(tokens.high / (config.step_tokens))
        held_out = config.validation_conversations * data.tokens_each.middle
        passes = math.ceil(steps / config.validate_every)
        seconds = seconds + Interval.exact(passes * held_out / measured.validation.per_second)
    return StageTime("train", work, f"{rate:,.0f} tokens/s", seconds.times(1 / 3600))


def _on_policy_time(run: Run, how: OnPolicyConfig, data: Volume, measured: Calibration) -> StageTime:
    config, texts, played = run.config.train, _texts(how, data), _played(how, data)
    tokens = how.steps * config.step_tokens
    work = (
        f"{how.rounds} x ({how.conversations:,} rollouts, {how.steps:,} steps of up to {config.step_tokens:,} tokens)"
    )
    if measured.training is None or measured.rollouts is None or texts is None:
        return StageTime("on_policy", work, "not measured", None)
    # Accepted drafts shorten the rollouts; by how much is not known yet.
    written = Interval(0.0, texts.high / measured.rollouts.per_second)
    seconds = written + Interval.exact(tokens / measured.training.per_second)
    if measured.extraction is not None and not run.online and played is not None:
        seconds = seconds + played.times(1 / measured.extraction.per_second)
    if measured.validation is not None:
        held_out = config.validation_conversations * data.tokens_each.middle
        passes = math.ceil(how.steps / config.validate_every) + 1
        seconds = seconds + Interval.exact(passes * held_out / measured.validation.per_second)
    rate = f"at most; {measured.rollouts.per_second:,.0f} tokens/s of rollouts"
    return StageTime("on_policy", work, rate, seconds.times(how.rounds / 3600))


def _texts(how: OnPolicyConfig, data: Volume) -> Interval | None:
    """Tokens that a round's rollouts emit: between the length of answers that the data has, and all that is allowed."""
    if data.conversations is None:
        return None
    most = how.max_new_tokens
    return Interval(min(most, data.trained_each.low), most).times(min(how.conversations, data.conversations))


def _played(how: OnPolicyConfig, data: Volume) -> Interval | None:
    """Tokens of a round's rollouts with their prompts."""
    texts = _texts(how, data)
    if texts is None or data.conversations is None:
        return None
    prompt = data.tokens_each.middle - data.trained_each.middle
    return texts + Interval.exact(prompt * min(how.conversations, data.conversations))


def _eval_time(run: Run, measured: Calibration) -> StageTime:
    config = run.config.eval
    suite = load_suite(config.suite, config.prompts, config.categories)
    prompts = len(suite) * config.repeats * len(config.temperatures)
    arms = list(dict.fromkeys([PLAIN, NGRAM, *(config.policies if run.trains else ())]))
    work = f"{prompts:,} prompts x {len(arms)} arms x {config.max_new_tokens} tokens"
    if not measured.passes:
        return StageTime("eval", work, "not measured", None)
    most = sum(measured.passes.values()) * prompts * config.max_new_tokens
    plain = measured.passes.get(PLAIN)
    how = "at most" if plain is None else f"at most; {1 / plain:,.1f} plain tokens/s"
    # Accepted drafts and answers that end early shorten it; by how much is what the run is to find out.
    return StageTime("eval", work, how, Interval(0.0, most / 3600))


def _expected(run: Run, shape: TargetOutline, data: Volume | None) -> list[Expected]:
    """One entry a policy of the evaluation. Rows of the table hold no n-gram branches, so neither does this."""
    if data is None:
        return []
    kinds: dict[str, Shape] = {
        name: "chain" if isinstance(policy, Chain) else "tree" for name, policy in run.config.eval.policies.items()
    }
    found = {
        shape_kind: None
        if data.tokens is None
        else expected(known_runs(), run.config.method.kind, shape_kind, shape.parameters, data.tokens.middle)
        for shape_kind in set(kinds.values())
    }
    return [Expected(name, kind, found[kind]) for name, kind in kinds.items()]


def _count(tokens: Interval) -> str:
    low, high = f"{tokens.low:,.0f}", f"{tokens.high:,.0f}"
    return low if low == high else f"{low} to {high}"
