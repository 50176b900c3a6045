from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sstf.data.answers import Answer
from sstf.data.chat_template import TurnRenderer, render, render_prompt, user_turn_prefix
from sstf.errors import DataError
from sstf.types import Conversation, Message, TokenSample


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation("c1", tuple(Message(role, text) for role, text in turns), "test")


def spell(tokenizer: PreTrainedTokenizerBase, sample: TokenSample) -> list[tuple[str, bool]]:
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids)
    return list(zip(tokens, sample.loss_mask, strict=True))


def untrained(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, False) for token in tokens]


def trained(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, True) for token in tokens]


def test_single_turn_trains_the_answer_and_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = render(tokenizer, conversation(("user", "Hi"), ("assistant", "Hello!")), 1024)
    assert spell(tokenizer, sample) == [
        *untrained("<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"),
        *trained("Hello", "!", "<|im_end|>"),
    ]


def test_multi_turn_leaves_the_line_break_after_an_answer_untrained(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = conversation(("system", "S"), ("user", "Hi"), ("assistant", "A"), ("user", "?"), ("assistant", "B"))
    assert spell(tokenizer, render(tokenizer, turns, 1024)) == [
        *untrained("<|im_start|>", "system", "Ċ", "S", "<|im_end|>", "Ċ"),
        *untrained("<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"),
        *trained("A", "<|im_end|>"),
        *untrained("Ċ", "<|im_start|>", "user", "Ċ", "?", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"),
        *trained("B", "<|im_end|>"),
    ]


def test_request_without_an_answer_at_the_end_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    answered = conversation(("user", "Hi"), ("assistant", "A"))
    more = conversation(("user", "Hi"), ("assistant", "A"), ("user", "?"))
    assert render(tokenizer, more, 1024) == render(tokenizer, answered, 1024)


def test_prompt_and_answer_are_not_merged_across_their_boundary(tokenizer: PreTrainedTokenizerBase) -> None:
    # The tokenizer has a token for two line breaks: tokenised as one text, the last prompt token would be that one.
    sample = render(tokenizer, conversation(("user", "Hi"), ("assistant", "\nA")), 1024)
    prompt = render_prompt(tokenizer, (Message("user", "Hi"),))
    assert sample.input_ids[: len(prompt)] == prompt
    assert spell(tokenizer, sample)[len(prompt) :] == trained("Ċ", "A", "<|im_end|>")


def test_generated_ids_stay_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    h, i, end = tokenizer.convert_tokens_to_ids(["H", "i", "<|im_end|>"])
    turns = conversation(("user", "?"), ("assistant", "Hi"), ("user", "?"), ("assistant", "Hi"))
    sample = render(tokenizer, turns, 1024, answers=(Answer((h, i, end), True), Answer((h, i), False)))
    context = ("<|im_start|>", "user", "Ċ", "?", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ")
    assert spell(tokenizer, sample) == [
        *untrained(*context),
        *trained("H", "i", "<|im_end|>"),
        *untrained("Ċ", *context),
        *trained("H", "i"),
    ]


def test_template_closes_a_cut_answer_untrained(tokenizer: PreTrainedTokenizerBase) -> None:
    h, newline, end = tokenizer.convert_tokens_to_ids(["H", "Ċ", "<|im_end|>"])
    turns = conversation(("user", "?"), ("assistant", "H\n"), ("user", "?"), ("assistant", "H"))
    sample = render(tokenizer, turns, 1024, answers=(Answer((h, newline), False), Answer((h, end), True)))
    assert spell(tokenizer, sample)[9:14] == [
        *trained("H", "Ċ"),
        *untrained("<|im_end|>", "Ċ", "<|im_start|>"),
    ]


def test_answer_whose_text_occurs_in_the_end_marker(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = render(tokenizer, conversation(("user", "Hi"), ("assistant", "end")), 1024)
    assert spell(tokenizer, sample)[9:] == trained("e", "n", "d", "<|im_end|>")


def test_template_without_end_marker_trains_through_the_content(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' if m['role'] == 'user' else '<|endoftext|>' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    )
    a, b, start = tokenizer.convert_tokens_to_ids(["A", "B", "<|im_start|>"])
    turns = conversation(("user", "Hi"), ("assistant", "A"), ("user", "?"), ("assistant", "B"))
    text = [
        *untrained("<|im_start|>", "Hi", "<|endoftext|>"),
        *trained("A"),
        *untrained("<|im_start|>", "?", "<|endoftext|>"),
        *trained("B"),
    ]
    assert spell(tokenizer, render(tokenizer, turns, 1024)) == text
    # The next turn's role marker ends generation: it is written once, and trained.
    sample = render(tokenizer, turns, 1024, answers=(Answer((a, start), True), Answer((b,), False)))
    assert spell(tokenizer, sample) == [*text[:4], ("<|im_start|>", True), *text[5:]]


def test_cut_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = conversation(("user", "Hi"), ("assistant", "Hello!"))
    whole, cut = render(tokenizer, turns, None), render(tokenizer, turns, 10)
    assert (cut.input_ids, cut.loss_mask) == (whole.input_ids[:10], [False] * 9 + [True])


def test_system_prompt_is_for_conversations_without_one(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = conversation(("user", "Hi"), ("assistant", "A"))
    own = conversation(("system", "own"), ("user", "Hi"), ("assistant", "A"))
    assert render(tokenizer, plain, 1024, "own") == render(tokenizer, own, 1024)
    assert render(tokenizer, own, 1024, "other") == render(tokenizer, own, 1024)


def test_template_that_rewrites_history_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('/')[-1] }}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = conversation(("user", "Hi"), ("assistant", "why/A"), ("user", "?"), ("assistant", "B"))
    with pytest.raises(DataError, match=r"c1, turn 3: the history is not kept.*'why/A<\|im_end\|>.*became 'A<\|im"):
        render(tokenizer, turns, 1024)


def test_template_whose_prompt_is_no_prefix_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    turns = conversation(("user", "Hi"), ("assistant", "A"))
    with pytest.raises(DataError, match=r"c1, turn 2: the prompt is not a prefix.*'<think>' became 'A<\|im_end"):
        render(tokenizer, turns, 1024)


def test_template_that_adds_text_before_the_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "('<think></think>' if m['role'] == 'assistant' else '') + m['content']"
    )
    with pytest.raises(DataError, match="expected 'A', the template wrote '<think></think>A"):
        render(tokenizer, conversation(("user", "Hi"), ("assistant", "A")), 1024)


def test_template_that_refuses_a_role(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"refuses the turns \(user\): no system role here"):
        render_prompt(tokenizer, (Message("user", "Hi"),))


def test_tokenizer_without_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template; use an instruction-tuned target"):
        render_prompt(tokenizer, (Message("user", "Hi"),))


def test_user_turn_prefix_ends_where_the_user_speaks(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(user_turn_prefix(tokenizer)) == ["<|im_start|>", "user", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(user_turn_prefix(tokenizer, "S")) == [
        *("<|im_start|>", "system", "Ċ", "S", "<|im_end|>", "Ċ", "<|im_start|>", "user", "Ċ")
    ]


words = st.text(st.sampled_from("Hi user\n<|>elo."), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_masks_cover_answers_only(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> None:
    turns = [turn for user, answer in pairs for turn in (("user", user), ("assistant", answer))]
    item = conversation(*turns)
    sample = render(tokenizer, item, None)
    renderer = TurnRenderer(tokenizer, "c1")
    trained_text = []
    for end in range(1, len(turns), 2):
        prompt = renderer.ask(item.messages[:end])
        assert sample.input_ids[: len(prompt)] == prompt
        renderer.keep(item.messages[: end + 1])
        # Nothing of the prompt beyond earlier answers is trained.
        assert sum(sample.loss_mask[: len(prompt)]) == sum(len(s.token_ids) for s in renderer.segments[1:-1:2])
        trained_text.append(tokenizer.decode(list(renderer.segments[-1].token_ids)))
    assert [token for segment in renderer.segments for token in segment.token_ids] == sample.input_ids
    assert trained_text == [answer + "<|im_end|>" for _, answer in pairs]
