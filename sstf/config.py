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
from sstf.methods import Eagle3Config, MethodConfig, TrainableMethod, build_method
from sstf.targets import TargetConfig
from sstf.train.config import TrainConfig
from sstf.train.on_policy import OnPolicyConfig


class RunConfig(Section):
    """Everything that decides a run. `output_dir` None means `runs/<name>`; `name` is the run's own. `seed` is of all
    that is drawn at random.

    `serving_context` is how many tokens a conversation will have where the head is served, None for all that the
    target takes. Only the plan reads it, to compare it with `data.max_length`.

    `on_policy` trains the head further on what comes of its own drafts; None, the default, does not.
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
    on_policy: OnPolicyConfig | None = None
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

    @field_validator("on_policy")
    @classmethod
    def _can_be_taught(cls, given: OnPolicyConfig | None, info: ValidationInfo) -> OnPolicyConfig | None:
        if given is None or "method" not in info.data:
            return given
        settings = info.data["method"]
        method = build_method(settings)
        if not isinstance(method, TrainableMethod):
            raise ValueError(f"method.kind={settings.kind} has no head to train on rollouts; remove on_policy")
        most = method.positions
        if given.depth is not None and given.depth > most:
            raise ValueError(
                f"on_policy.depth is {given.depth}, but method {settings.kind} teaches {most} draft positions; "
                f"expected 1 to {most}, or nothing for all of them"
            )
        return given

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.output_dir or Path("runs") / self.name
