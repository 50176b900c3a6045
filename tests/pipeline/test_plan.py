"""`sstf plan` on the tiny target: what it foresees against what the run then is, and what it warns of."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pipeline_runs import WriteConfig, open_run
from rich.console import Console

from sstf.cli import main
from sstf.data.progress import NoProgress
from sstf.data.tokens import TokenStore
from sstf.planning import Plan, make_plan, planner, print_plan

SECONDS = 0.5


def plan_of(config: Path, *overrides: str, measure: bool = True) -> Plan:
    return make_plan(open_run(config, *overrides), NoProgress(), measure, SECONDS)


def command(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed.err if code else printed.out


def warnings(plan: Plan) -> str:
    return "\n".join(f"{a.level}: {a.text}" for a in plan.advice)


def refuse(*args: object) -> None:
    raise AssertionError("the target was loaded")


def test_the_plan_holds_what_the_run_then_is(
    finished: Path, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny target's answers end within 16 tokens or at them, so the calibration sees whole answers.
    plan, done = plan_of(write_config()), open_run(finished)
    made = TokenStore(done.folder("data")).read()
    tokens, trained = sum(len(s.input_ids) for s in made), sum(sum(s.loss_mask) for s in made)
    data = plan.data
    assert data is not None and data.tokens is not None and data.trained is not None and data.written is not None
    assert data.conversations == 12
    assert data.tokens.low * 0.9 <= tokens <= data.tokens.high * 1.1
    assert data.trained.low * 0.9 <= trained <= data.trained.high * 1.1
    assert data.answer is not None and data.answer.high <= 16
    assert [t.stage for t in plan.times] == ["data", "extract", "train", "eval"]
    assert all(t.hours is not None and t.hours.high > 0 for t in plan.times)
    found = plan.calibration
    assert found is not None and found.writing is not None and found.extraction is not None
    assert found.training is not None and set(found.passes) == {"plain", "ngram", "chain", "tree"}
    assert set(found.packed) == {"bf16", "fp8", "int8"} and all(0 < share < 1.2 for share in found.packed.values())
    assert [m.stage for m in plan.memory] == ["regeneration", "extraction", "training", "evaluation"]
    features = next(part.bytes for part in plan.disk if part.name == "features")
    stored = sum(file.stat().st_size for file in done.folder("extract").glob("shard-*.safetensors"))
    assert features is not None and 0.5 * stored < features.high < 1.5 * stored
    # A run of 12 conversations has no comparable one.
    assert [one.runs for one in plan.expected] == [None, None]


def test_nothing_is_written(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    before = sorted(tmp_path.rglob("*"))
    plan_of(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_run_has_nothing_left_to_do(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "load_configured", refuse)
    plan = plan_of(finished)
    assert plan.data is not None and plan.data.exact and plan.data.tokens is not None
    summary = open_run(finished).summary("data")
    assert summary is not None and plan.data.tokens.low == plan.data.tokens.high == pytest.approx(summary["tokens"])
    assert all(t.work == "done" and t.hours is not None and t.hours.high == 0 for t in plan.times)
    assert plan.disk == [] and plan.memory == [] and plan.calibration is None


def test_only_what_is_not_done_is_planned(finished: Path) -> None:
    plan = plan_of(finished, "train.optimizer.learning_rate=2e-3")
    assert [t.work == "done" for t in plan.times] == [True, True, False, False]
    assert [m.stage for m in plan.memory] == ["training", "evaluation"]
    assert [part.name for part in plan.disk] == ["checkpoints (3)", "head, and its exports"]
    assert plan.calibration is not None and plan.calibration.writing is None


def test_without_calibration_the_weights_stay_where_they_are(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "load_configured", refuse)
    plan = plan_of(write_config(), measure=False)
    assert plan.calibration is None
    assert [t.hours for t in plan.times] == [None] * 4
    assert plan.data is not None and plan.data.answer is not None
    assert (plan.data.answer.low, plan.data.answer.high) == (1, 16)
    assert plan.disk_needed is not None and plan.disk_needed.low < plan.disk_needed.high


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        (
            {"data__source": {"kind": "self_written", "conversations": 9, "slots": 4}},
            ["data", "extract", "train", "eval"],
        ),
        ({"data__answers": {"kind": "keep"}}, ["data", "extract", "train", "eval"]),
        ({"extract__online": True}, ["data", "train", "eval"]),
        ({"extract__codec": "int8", "extract__compression": "zstd"}, ["data", "extract", "train", "eval"]),
        ({"extract__teacher": {"kind": "topk", "k": 8}}, ["data", "extract", "train", "eval"]),
        ({"method": {"kind": "ngram"}, "eval__policies": None}, ["eval"]),
        (
            {"on_policy": {"rounds": 2, "conversations": 4, "max_new_tokens": 8, "slots": 2, "steps": 3}},
            ["data", "extract", "train", "on_policy", "eval"],
        ),
        ({"train__steps": None, "train__epochs": 2, "train__validation_conversations": 0}, None),
    ],
)
def test_every_kind_of_run(changes: dict[str, Any], stages: list[str] | None, write_config: WriteConfig) -> None:
    config = write_config(**changes)
    text = config.parent / "conversations.jsonl"
    if changes.get("data__answers") == {"kind": "keep"}:
        rows = [json.loads(line) for line in text.read_text().splitlines()]
        whole = [row | {"messages": row["messages"][:2]} for row in rows]
        text.write_text("".join(json.dumps(row) + "\n" for row in whole))
    plan = plan_of(config)
    if stages is not None:
        assert [t.stage for t in plan.times] == stages
    assert all(t.hours is not None for t in plan.times), plan.times
    assert any(part.name == "features" for part in plan.disk) == ("extract" in [t.stage for t in plan.times])
    json.dumps(plan.to_json())
    out = StringIO()
    print_plan(plan, Console(width=80, file=out))
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80


def test_a_second_phase_is_counted(finished: Path) -> None:
    """Where the training is done, rollouts, their features and the steps on them are what is left."""
    section = ["rounds=2", "conversations=4", "max_new_tokens=8", "slots=2", "steps=3"]
    plan = plan_of(finished, *(f"on_policy.{one}" for one in section))
    done = {t.stage: t.work == "done" for t in plan.times}
    assert done == {"data": True, "extract": True, "train": True, "on_policy": False, "eval": False}
    hours = next(t.hours for t in plan.times if t.stage == "on_policy")
    found = plan.calibration
    assert hours is not None and found is not None and found.rollouts is not None and found.training is not None
    steps_s = 2 * 3 * open_run(finished).config.train.step_tokens / found.training.per_second
    assert steps_s < hours.low * 3600 < hours.high * 3600
    assert hours.high - hours.low > 0.9 * 2 * 4 * 8 / found.rollouts.per_second / 3600  # at most eight tokens a text
    assert [m.stage for m in plan.memory] == ["training", "rollouts", "evaluation"]
    features = next(part.bytes for part in plan.disk if part.name == "features of rollouts")
    kept, texts = open_run(finished).folder("extract"), TokenStore(open_run(finished).folder("data")).read()
    stored = sum(file.stat().st_size for file in kept.glob("shard-*.safetensors"))
    each = stored / sum(len(s.input_ids) for s in texts)
    prompts = sum(s.loss_mask.index(True) for s in texts) / len(texts)
    assert features is not None and 0.5 < features.high / (each * 2 * 4 * (prompts + 8)) < 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "warning: data.max_length is 128 and the serving context 256"),
        ([], "tokens are smoke-sized: known runs of this size reached an accepted length of 1."),
        (["data.max_length=300"], "error: data.max_length is 300, target tiny has a context of 256"),
        (["train.step_tokens=16"], "tokens, train.step_tokens is 16: such a conversation is a batch of its own"),
        (["train.validation_conversations=0"], "warning: train.validation_conversations is 0"),
        ([], "warning: 2 held-out conversations have about"),
    ],
)
def test_warnings(overrides: list[str], expected: str, write_config: WriteConfig) -> None:
    assert expected in warnings(plan_of(write_config(), *overrides, measure=False))


def test_no_warning_where_there_is_no_cause(write_config: WriteConfig) -> None:
    found = warnings(plan_of(write_config(), "serving_context=100", measure=False))
    assert "serving context" not in found and "batch_tokens" not in found and "disk" not in found


def test_a_draft_vocabulary_that_the_data_cannot_fill(finished: Path) -> None:
    trained = {
        token
        for s in TokenStore(open_run(finished).folder("data")).read()
        for token, flag in zip(s.input_ids, s.loss_mask, strict=True)
        if flag
    }
    found = warnings(plan_of(finished, measure=False))
    assert f"The draft vocabulary has 200 tokens, the data trains {len(trained)} different ones" in found
    few = f"method.draft_vocab_size={max(16, len(trained))}"
    assert "draft vocabulary" not in warnings(plan_of(finished, few, measure=False))


def test_a_disk_and_a_memory_that_are_too_small(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "free_disk", lambda folder: 10_000)
    monkeypatch.setattr(planner, "device_memory", lambda device: 10_000)
    plan = plan_of(write_config())
    found = [a.text for a in plan.advice if a.level == "error"]
    assert found[0].startswith("The disk is too small: up to 0.0 GiB will be written under")
    assert "extract.codec=" in found[0]
    assert [text.split(": it needs")[0] for text in found[1:]] == [
        f"Memory is too small for {stage}" for stage in ("regeneration", "extraction", "training", "evaluation")
    ]
    assert "not even one slot fits" in found[1]
    assert plan.calibration is None  # the target would not fit, so it was not loaded


def test_as_many_slots_as_fit_are_named(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "resident_memory", lambda: 0)
    config = write_config(data__answers__slots=512)
    needed = next(m for m in plan_of(config, measure=False).memory if m.stage == "regeneration")
    monkeypatch.setattr(planner, "device_memory", lambda device: int(0.9 * needed.bytes))
    found = warnings(plan_of(config, measure=False))
    slots = int(found.split("lower data.answers.slots from 512 to ")[1].split(",")[0])
    fits = plan_of(config, f"data.answers.slots={slots}", measure=False)
    assert "regeneration" not in warnings(fits)
    assert 0 < slots < 512


def test_the_command_prints_tables_for_a_narrow_terminal(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = command([str(write_config()), "data.max_conversations=5", "--no-calibration"], capsys)
    assert max(len(line) for line in out.splitlines()) <= 80
    for title in ("tiny: eagle3 for tiny", "Data (5 conv", "Disk still", "Features by codec", "Memory (", "Time,"):
        assert title in out
    assert "bf16, hidden (chosen)" in out and "no comparable run" in out and "warning: " in out


def test_the_command_prints_the_same_as_json(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(command([str(write_config()), "--json", "--no-calibration"], capsys))
    assert found["data"]["conversations"] == 12
    assert found["data"]["tokens"]["low"] < found["data"]["tokens"]["high"]
    assert {form["codec"] for form in found["forms"]} == {"bf16", "fp8", "int8"}
    assert found["disk_needed"]["high"] > 0
    assert all(stage["bytes"] > 0 for stage in found["memory"])
    assert [time["stage"] for time in found["times"]] == ["data", "extract", "train", "eval"]
    assert found["advice"] and found["calibration"] is None


def test_bad_input_is_one_sentence(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config()
    (config.parent / "conversations.jsonl").unlink()
    assert "does not exist" in command([str(config)], capsys, code=2)
    assert command([str(config), "target.name=/nowhere"], capsys, code=2).startswith("error: target /nowhere")
    assert "serving_contxt" in command([str(config), "serving_contxt=3"], capsys, code=2)


def test_the_serving_context_changes_no_key(finished: Path) -> None:
    assert open_run(finished, "serving_context=64").keys == open_run(finished).keys


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(command(["--help"], capsys).split())
    assert "example: sstf plan configs/smollm2-135m-instruct/demo.yaml data.max_conversations=1000" in words
