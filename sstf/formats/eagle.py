"""EAGLE-1 heads, and so those of EAGLE-2 and HASS, in the form of EAGLE's repository, which vLLM and SGLang load.

    fc.weight [hidden, 2 * hidden]     reads [embedding; hidden state]
    layers.<i>.{self_attn, mlp, ..}    Llama's; the first without input_layernorm

There is no lm_head: engines draft with the target's, so from its whole vocabulary. `fc.bias` is optional in EAGLE's
repository, unknown to vLLM, and expected by SGLang, which would start it from noise: it is written as zeros for SGLang.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from sstf.errors import ExportError, HeadError
from sstf.formats.compatibility import needs
from sstf.formats.decoder_layer import check_layers, check_sizes, layer_fields, layer_settings, written_scaling
from sstf.formats.family import Family, Order, check_read_back
from sstf.formats.files import Published, check_exportable, check_shapes, check_values, write_published
from sstf.formats.layer_ids import Engine
from sstf.formats.vocabulary_map import MAPS, in_order
from sstf.heads import EagleShape
from sstf.methods import EagleConfig
from sstf.methods.checkpoint import StoredHead
from sstf.methods.eagle import EagleMethod
from sstf.targets import TargetSpec

CLASSES: dict[Engine, str] = {"vllm": "EagleLlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
# The target's, and a table that is computed.
LEFT_OUT = ("lm_head.weight", "layers.0.self_attn.rotary_emb.inv_freq")


def write_eagle(order: Order) -> list[str]:
    """See `families.export_head`."""
    stored, engine = order.stored, order.engine
    spec, size = stored.target, len(stored.tensors["d2t"])
    shape = EagleMethod(stored.config).shape(spec, size)
    check_exportable(stored.tensors, _shapes(shape), "an EAGLE head")
    if size != spec.vocab_size:
        raise ExportError(
            f"{engine} drafts from all {spec.vocab_size:,} tokens with an EAGLE head, this one from {size:,}; train "
            "with method.draft_vocab_size left out"
        )
    sentences = needs(engine, ["eagle"] + ["several_layers"] * (shape.num_layers > 1))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in stored.tensors.items() if name not in MAPS}
    if engine == "sglang":
        tensors["fc.bias"] = torch.zeros(shape.hidden_size, dtype=torch.bfloat16)
    fields: dict[str, Any] = {
        **layer_fields(shape, shape.num_layers),
        "architectures": [CLASSES[engine]],
        "torch_dtype": "bfloat16",
        "bias": engine == "sglang",
        "rope_theta": shape.rope_theta,
        "rope_scaling": written_scaling(shape),
    }
    write_published(order.folder, fields, tensors)
    check_read_back(order, read_eagle, ("num_layers",))
    return sentences


def is_eagle(head: Published) -> bool:
    """By its class, or as a head whose first layer reads what fc makes of a token and a state, without a map."""
    if head.speculators_type is not None:
        return False
    fc, query = head.tensors.get("fc.weight"), head.tensors.get("layers.0.self_attn.q_proj.weight")
    plain = fc is not None and query is not None and fc.shape[-1] == 2 * query.shape[-1]
    return head.is_built_as(*CLASSES.values()) or (plain and not {"d2t", "hidden_norm.weight"} & head.tensors.keys())


def read_eagle(head: Published, target: TargetSpec) -> StoredHead:
    """The head as one of ours.

    Raises:
        HeadError: it cannot be used here, or is for a target of another shape.
    """
    check_sizes(head, target)
    check_layers(head, {})
    if unlike := layer_settings(head, target):
        name, value = next(iter(unlike.items()))
        raise HeadError(f"its layers have {name}={value!r}, those of EAGLE heads here are as in the target")
    tensors = {name: tensor for name, tensor in head.tensors.items() if name not in LEFT_OUT}
    bias, embeddings = tensors.pop("fc.bias", torch.zeros(1)), tensors.pop("embed_tokens.weight", None)
    if bias.any():
        raise HeadError("its fc has a bias, which EAGLE heads here and in vLLM do not have")
    try:
        config = EagleConfig(num_layers=head.fields.get("num_hidden_layers", 1))
    except ValidationError as error:
        raise HeadError(f"its config.json asks for what no head here can have: {error.errors()[0]['msg']}") from None
    expected = _shapes(EagleMethod(config).shape(target, target.vocab_size))
    check_shapes(tensors, {name: size for name, size in expected.items() if name not in MAPS}, "EAGLE", {})
    check_values(tensors)
    tensors = in_order(tensors, target.vocab_size, target.vocab_size, ())
    run = {"form": head.form, "layers_from": "EAGLE heads read the last"}
    return StoredHead(config, tensors, (target.num_layers - 1,), target, run, embeddings)


def _shapes(shape: EagleShape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    for i in range(shape.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden),
            "self_attn.o_proj": (hidden, heads),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if i:
            layer["input_layernorm"] = (hidden,)
        shapes |= {f"layers.{i}.{name}.weight": size for name, size in layer.items()}
    return shapes | {"d2t": (shape.draft_vocab_size,), "t2d": (shape.vocab_size,)}


FAMILY = Family(
    named="EAGLE",
    engines=("vllm", "sglang"),
    write=write_eagle,
    claims=is_eagle,
    read=read_eagle,
    vllm={"method": "eagle"},
    sglang="EAGLE",
)
