"""What the official client gets: the decoder's own text, whole and in pieces, alone and in company."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from loopback_server import Running, lookup, running

from sstf.data.chat_template import render_prompt
from sstf.decode import SpeculativeDecoder
from sstf.targets import Target
from sstf.types import Message

MESSAGES: list[Any] = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hello user"}]
NEW = 24


def decoded(decoder: SpeculativeDecoder, ids: list[int], **options: Any) -> tuple[str, list[int]]:
    """Text and ids, an end token left out of the text."""
    found = decoder.generate(ids, **options).token_ids
    text = found[:-1] if found[-1] in decoder.target.end_tokens else found
    return str(decoder.target.tokenizer.decode(text, skip_special_tokens=True)), found


def prompt_ids(target: Target) -> list[int]:
    return render_prompt(target.tokenizer, [Message("system", "Hi"), Message("user", "Hello user")])


def test_models(served: Running) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sstf"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("gpt")


def test_greedy_chat_is_the_decoders_text(served: Running, decoder: SpeculativeDecoder) -> None:
    text, ids = decoded(decoder, prompt_ids(decoder.target), max_new_tokens=NEW)
    found = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=NEW
    )
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == ("stop" if len(ids) < NEW else "length")
    assert found.object == "chat.completion" and found.model == "tiny" and found.id.startswith("chatcmpl-")
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt_ids(decoder.target))
    assert found.usage.completion_tokens == len(ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(ids)


def test_parts_of_a_message(served: Running, decoder: SpeculativeDecoder) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo user"}]
    messages: list[Any] = [MESSAGES[0], {"role": "user", "content": parts}]
    create = served.client().chat.completions.create
    found = create(model="tiny", messages=messages, temperature=0, max_tokens=NEW)
    assert found.choices[0].message.content == decoded(decoder, prompt_ids(decoder.target), max_new_tokens=NEW)[0]
    # An answer goes back into the history as the client has it, nulls included.
    history = [*messages, found.choices[0].message.model_dump(), MESSAGES[1]]
    assert create(model="tiny", messages=history, temperature=0, max_tokens=2).usage is not None


def test_completions_of_text_and_of_ids(served: Running, decoder: SpeculativeDecoder) -> None:
    client, text = served.client(), "Hello user, Hello"
    ids = decoder.target.tokenizer.encode(text)
    expected, new = decoded(decoder, ids, max_new_tokens=NEW)
    forms: list[Any] = [text, [text], ids, [ids]]
    for prompt in forms:
        found = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=NEW, extra_body={"return_token_ids": True}
        )
        assert found.choices[0].text == expected and found.id.startswith("cmpl-")
        extra = found.choices[0].model_extra
        assert extra is not None and extra["token_ids"] == new and extra["prompt_token_ids"] == ids
    usage = client.completions.create(model="tiny", prompt=text, temperature=0).usage
    assert usage is not None and usage.completion_tokens == min(
        16, len(decoder.generate(ids, 200 - len(ids)).token_ids)
    )


def test_a_stream_is_the_same_text(served: Running, decoder: SpeculativeDecoder) -> None:
    text, ids = decoded(decoder, prompt_ids(decoder.target), max_new_tokens=NEW)
    options: dict[str, Any] = dict(model="tiny", messages=MESSAGES, temperature=0, max_tokens=NEW, stream=True)
    chunks = list(served.client().chat.completions.create(**options, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert len(pieces) > 4  # it is one
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == ("stop" if len(ids) < NEW else "length")
    assert all(piece.usage is None for piece in pieces) and len({chunk.id for chunk in chunks}) == 1
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == len(ids)
    without = list(served.client().chat.completions.create(**options))
    assert "".join(piece.choices[0].delta.content or "" for piece in without) == text
    assert all(piece.choices and piece.usage is None for piece in without)
    words = served.client().completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=8, stream=True)
    expected = decoded(decoder, decoder.target.tokenizer.encode("Hello"), max_new_tokens=8)[0]
    assert "".join(word.choices[0].text for word in words) == expected


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 5}])
def test_a_seed_gives_the_same_text_again_and_in_company(
    options: dict[str, Any], served: Running, decoder: SpeculativeDecoder
) -> None:
    client, ids = served.client(), prompt_ids(decoder.target)
    extra = {key: value for key, value in options.items() if key == "top_k"}
    own = {key: value for key, value in options.items() if key != "top_k"}

    def ask(seed: int) -> str:
        found = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=NEW, seed=seed, extra_body=extra, **own
        )
        return found.choices[0].message.content or ""

    expected = [
        decoded(decoder, ids, max_new_tokens=NEW, seed=seed, **({"temperature": 1.0} | options))[0] for seed in range(6)
    ]
    assert len(set(expected)) > 3
    assert [ask(seed) for seed in (0, 1)] == expected[:2]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == expected


def test_without_a_seed_texts_differ(served: Running) -> None:
    def ask() -> str | None:
        found = served.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=NEW)
        return found.choices[0].message.content

    assert len({ask() for _ in range(4)}) > 1


def test_requests_side_by_side_each_get_their_own_text(served: Running, decoder: SpeculativeDecoder) -> None:
    """Twenty for three slots: greedy and sampled, long and short, streamed and whole."""
    client = served.client()

    def options(i: int) -> dict[str, Any]:
        return {"temperature": (0.0, 1.0)[i % 2], "seed": i, "max_tokens": 3 + 5 * (i % 7)}

    def ask(i: int) -> str:
        prompt = f"Hello user {i} " * (1 + i % 3)
        if i % 3:
            return client.completions.create(model="tiny", prompt=prompt, **options(i)).choices[0].text
        stream = client.completions.create(model="tiny", prompt=prompt, stream=True, **options(i))
        return "".join(piece.choices[0].text for piece in stream)

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    for i, text in enumerate(found):
        ids = decoder.target.tokenizer.encode(f"Hello user {i} " * (1 + i % 3))
        chosen = options(i)
        chosen["max_new_tokens"] = chosen.pop("max_tokens")
        assert text == decoded(decoder, ids, **chosen)[0]


def test_stop_strings_are_not_given_out(served: Running, decoder: SpeculativeDecoder) -> None:
    """Also one that begins in one token and ends in another, and not a part of it on the way."""
    ids = decoder.target.tokenizer.encode("Hello user")
    text = decoded(decoder, ids, max_new_tokens=60)[0]
    tokens = [str(decoder.target.tokenizer.decode([token])) for token in decoder.generate(ids, 60).token_ids]
    at = next(i for i in range(4, len(tokens) - 4) if all("�" not in t and t.strip() for t in tokens[i : i + 3]))
    across = (
        "".join(tokens[at : at + 3])[1:-1] if len("".join(tokens[at : at + 3])) > 4 else "".join(tokens[at : at + 3])
    )
    expected = text[: text.index(across)]
    client = served.client()
    for stop in (across, ["\x00\x01", across], [across, text[-3:]]):
        options: dict[str, Any] = dict(model="tiny", prompt="Hello user", temperature=0, max_tokens=60, stop=stop)
        whole = client.completions.create(**options)
        assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "stop"
        pieces = list(client.completions.create(**options, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        assert pieces[-1].choices[0].finish_reason == "stop"
    beginning = client.completions.create(
        model="tiny", prompt="Hello user", temperature=0, max_tokens=60, stop=across + "\x00"
    )
    assert beginning.choices[0].text == text  # a beginning alone was held back, and given out at the end


def test_end_tokens_have_no_text(tiny_target: Target, decoder: SpeculativeDecoder, served: Running) -> None:
    """Even where special tokens are shown. Sampled until a text ends."""
    client = served.client()
    for seed in range(200):
        found = decoder.generate([5, 6, 7], 60, temperature=1.0, seed=seed).token_ids
        if found[-1] in tiny_target.end_tokens and len(found) > 3:
            break
    answer = client.completions.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=60,
        temperature=1,
        seed=seed,
        extra_body={"skip_special_tokens": False, "stop_token_ids": sorted(tiny_target.end_tokens)},
    )
    assert answer.choices[0].text == tiny_target.tokenizer.decode(found[:-1])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == len(found)


def test_metrics_have_the_reports_figures(tiny_target: Target) -> None:
    """Against the accepted lengths of the same decoder, used directly."""
    local = lookup(tiny_target)
    prompts = [[5, 6, 7, 8] * 6, [9, 10] * 9, list(range(20, 50))]
    lengths = [length for ids in prompts for length in local.generate(ids, NEW).accepted_lengths]
    tokens = [len(local.generate(ids, NEW).token_ids) for ids in prompts]
    with running(lookup(tiny_target)) as server:
        for ids in prompts:
            server.client().completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=NEW)
        found = server.metrics()
    assert max(lengths) > 2
    assert found["sstf_accepted_length",] == pytest.approx(sum(lengths) / len(lengths))
    survival = [sum(length > i + 1 for length in lengths) / len(lengths) for i in range(max(lengths) - 1)]
    for position, share in enumerate(survival):
        before = survival[position - 1] if position else 1.0
        assert found["sstf_survival", str(position)] == pytest.approx(share)
        assert found["sstf_acceptance_rate", str(position)] == pytest.approx(share / before)
        assert found["sstf_accepted_tokens_per_position_total", str(position)] == round(share * len(lengths))
    assert ("sstf_survival", str(len(survival))) not in found
    assert found["sstf_verify_passes_total",] == len(lengths)
    assert found["sstf_verified_tokens_total",] == sum(lengths) == sum(tokens) - len(prompts)
    assert found["sstf_draft_tokens_total",] >= found["sstf_accepted_tokens_total",] > 0
    assert found["sstf_generation_tokens_total",] == sum(tokens)
    assert found["sstf_prompt_tokens_total",] == sum(map(len, prompts))
    assert found["sstf_requests_total", "/v1/completions", "200"] == len(prompts)
    assert found["sstf_requests_running",] == found["sstf_requests_waiting",] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "queue_time"):
        assert found[f"sstf_{name}_seconds_count",] == len(prompts)
    assert found["sstf_time_per_output_token_seconds_count",] == sum(count > 1 for count in tokens)
    assert sum(value for name, value in found.items() if name[0] == "sstf_answers_total") == len(prompts)
    assert found["process_resident_memory_bytes",] > 0
