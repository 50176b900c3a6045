"""Who computes the hidden states: transformers in processes of this machine, Ray's actors on many, or vLLM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sstf.config_loading import Section
from sstf.targets.vllm import VllmConfig


class TransformersEngine(Section):
    """This machine. With several workers each is a process with the model, on a GPU of its own where there are GPUs."""

    kind: Literal["transformers"] = "transformers"


class RayEngine(Section):
    """Ray Data: `extract.workers` actors with the model. `address` is the cluster's; None starts Ray on this machine.

    The run's folder has to be shared by all machines, and sstf installed on each.
    """

    kind: Literal["ray"]
    address: str | None = None
    gpus: float = Field(default=1, ge=0, description="GPUs of one actor, where the cluster has any")


class VllmEngine(VllmConfig):
    """vLLM, in one process of its own."""

    kind: Literal["vllm"]


Engine = Annotated[TransformersEngine | RayEngine | VllmEngine, Field(discriminator="kind")]
