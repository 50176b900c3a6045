"""Data sets that are known by a short name: where they lie, and which part of them is conversations to train on.

Their columns need no table: `rows` tells the forms apart. The sets' own answers come from other models; see
`regenerate` for why they are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

from sstf.data.config import HubSource


@dataclass(frozen=True)
class KnownSet:
    """One data set of the hub: `file` where the repository holds more than the set."""

    repository: str
    subset: str | None = None
    split: str = "train"
    file: str | None = None


KNOWN_SETS = {
    "sharegpt": KnownSet(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "ultrachat-200k": KnownSet("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "open-perfectblend": KnownSet("mlabonne/open-perfectblend"),
    "magpie": KnownSet("Magpie-Align/Magpie-Pro-300K-Filtered"),
    "smoltalk": KnownSet("HuggingFaceTB/smoltalk", subset="all"),
    "smol-smoltalk": KnownSet("HuggingFaceTB/smol-smoltalk"),
    "openhermes": KnownSet("teknium/OpenHermes-2.5"),
    "tulu-3": KnownSet("allenai/tulu-3-sft-mixture"),
    "gsm8k": KnownSet("openai/gsm8k", subset="main"),
    "alpaca": KnownSet("tatsu-lab/alpaca"),
    "glaive-toolcall": KnownSet("llamafactory/glaive_toolcall_en"),
    "hermes-function-calling": KnownSet("NousResearch/hermes-function-calling-v1", subset="func_calling"),
    "mixture-of-thoughts": KnownSet("open-r1/Mixture-of-Thoughts", subset="all"),
}


def resolve(source: HubSource) -> tuple[KnownSet, HubSource]:
    """The set that a source names, and the source with its full name, subset and split."""
    known = KNOWN_SETS.get(source.name, KnownSet(source.name))
    filled = source.model_copy(
        update={
            "name": known.repository,
            "subset": source.subset or known.subset,
            "split": source.split or known.split,
        }
    )
    return known, filled
