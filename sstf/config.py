"""The run configuration: one YAML file a run, each section owned by the package that it configures."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from sstf.config_loading import Section
from sstf.data.config import DataConfig, SampleSource
from sstf.errors import ConfigError
from sstf.evaluation import EvalConfig
from sstf.features import ExtractConfig
from sstf.formats import ExportConfig
from sstf.methods import Eagle3Config, MethodConfig, build_method
from sstf.targets import TargetConfig
from sstf.train.config import TrainConfig


class RunConfig(Section):
    """Everything that decides a run. `output_dir` None means `runs/<name>`; `name` is the run's own. `seed` is of all
    that is drawn at random.

    `serving_context` is how many tokens a conversation will have where the head is served, None for all that the
    target takes. Only the plan reads it, to compare it with `data.max_length`.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Path | None = None
    seed: int = Field(default=0, ge=0)
    serving_context: int | None = Field(default=None, ge=1)
    target: TargetConfig = TargetConfig(name="smollm2-135m-instruct")
    data: DataConfig = DataConfig(source=SampleSource())
    extract: ExtractConfig = ExtractConfig()
    method: MethodConfig = Eagle3Config()
    train: TrainConfig = TrainConfig(epochs=3)
    eval: EvalConfig = Field(default=EvalConfig(), validate_default=True)
    export: ExportConfig = ExportConfig()

    @field_validator("eval")
    @classmethod
    def _can_be_drafted(cls, given: EvalConfig, info: ValidationInfo) -> EvalConfig:
        if "method" not in info.data:  # it is wrong itself, and that is said
            return given
        method = info.data["method"]
        try:
            return given.fitted(build_method(method).limits, f"method {method.kind}")
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.output_dir or Path("runs") / self.name
