"""DSpark heads in the form that vLLM loads (`qwen3_dspark.py`) and in speculators': DFlash's tensors (`block.py`), and

    markov_head.markov_w1.weight [vocab, rank], markov_head.markov_w2.weight [draft_vocab, rank]
    confidence_head.proj.{weight [1, hidden + rank], bias [1]}

What DFlash keeps in `dflash_config` stands at the top of the configuration.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError

from sstf.errors import HeadError
from sstf.formats.block import block_settings, read_block, write_block
from sstf.formats.block_forms import asked_of, own_fields, speculators_block
from sstf.formats.family import Family, Order
from sstf.formats.files import Published, check_exportable
from sstf.heads import BlockShape, DSparkHead
from sstf.methods import DSparkConfig
from sstf.methods.block import block_shape
from sstf.methods.checkpoint import StoredHead
from sstf.targets import TargetSpec

CLASS = "Qwen3DSparkModel"
# What no head here does otherwise.
FIXED = {
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "sample_from_anchor": True,
}


def write_dspark(order: Order) -> list[str]:
    """See `families.export_head`."""
    stored = order.stored
    shape = block_shape(stored.config, stored.target, first_slot=0)
    expected = dspark_shapes(shape, len(stored.tensors["d2t"]), stored.config.rank)
    check_exportable(stored.tensors, expected, "a DSpark head")
    if order.engine == "speculators":
        fields = speculators_block(order, shape, "dspark", "DSparkSpeculator")
    else:
        asked = {"mask_token_id": int(stored.tensors["mask_token"]), "target_layer_ids": list(stored.layers)}
        fields = own_fields(order, shape) | {"architectures": [CLASS]} | asked
    return write_block(order, shape, fields | {"markov_rank": stored.config.rank} | FIXED, "dspark", read_dspark)


def is_dspark(head: Published) -> bool:
    """By its class or its Markov head; in speculators' form by its kind."""
    if head.speculators_type is not None:
        return head.speculators_type == "dspark"
    return head.is_built_as(CLASS) or "markov_head.markov_w1.weight" in head.tensors


def read_dspark(head: Published, target: TargetSpec) -> StoredHead:
    """The head as one of ours.

    Raises:
        HeadError: it cannot be used here, or is for a target of another shape.
    """
    for name, value in FIXED.items():
        if head.config.get(name, value) != value:
            raise HeadError(f"its config.json asks for {name}={head.config[name]!r}, which heads here do not have")
    settings = block_settings(head, asked_of(head, head.config), target) | {"rank": head.number("markov_rank")}
    try:
        config = DSparkConfig.model_validate(settings)
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None
    size = min(target.vocab_size, config.vocabulary)
    shapes = dspark_shapes(block_shape(config, target, first_slot=0), size, config.rank)
    return read_block(head, target, config, shapes, ("markov_head.markov_w2.weight",))


def dspark_shapes(shape: BlockShape, draft_vocab_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a head of ours."""
    with torch.device("meta"):
        rows = torch.empty(shape.vocab_size, shape.hidden_size)
        head = DSparkHead(shape, rows, rows, torch.arange(draft_vocab_size), 0, rank)
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


FAMILY = Family(
    named="DSpark",
    engines=("vllm", "speculators"),
    write=write_dspark,
    claims=is_dspark,
    read=read_dspark,
    vllm={"method": "dspark"},
    with_target=("vllm", "speculators"),
)
