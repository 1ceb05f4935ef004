"""Manifests of other trainers: each form is read as it is meant, or refused by the key's name.

Kinds of line (rows) and forms (columns). "=" is read, "no" is refused by name, "-" cannot be written in that form.

| kind                                   | own/NeMo | Canary | SALM | ms-swift | LLaMA-F. | HF data | SLAM-LLM |
|----------------------------------------|----------|--------|------|----------|----------|---------|----------|
| transcription                          | =        | =      | -    | -        | -        | =       | =        |
| question with an answer                | =        | -      | =    | =        | =        | =       | =        |
| text only                              | =        | -      | =    | =        | =        | -       | -        |
| system prompt                          | =        | -      | =    | =        | =        | -       | -        |
| earlier turns                          | =        | -      | =    | =        | =        | -       | -        |
| `<audio>` alone, within, or at the end | =        | -      | =    | =        | =        | =       | =        |
| content parts, typed turns             | -        | -      | =    | =        | =        | =       | -        |
| last question without an answer        | no       | -      | no   | no       | no       | no      | no       |
| place-holder as an answer              | text, no | text   | no   | no       | no       | -       | text     |
| translation                            | =        | =      | =    | =        | =        | =       | =        |
| `task: asr`, `taskname`                | =        | =      | -    | =        | -        | =       | =        |
| several recordings                     | no       | no     | no   | no       | no       | no      | -        |
| sound inside the line, addresses       | no       | no     | no   | no       | no       | no      | no       |
| tools, pictures, other roles           | said     | -      | no   | no       | no       | no      | -        |
| answers that must not be learnt        | -        | -      | -    | no       | no       | -       | -        |
| marks of other models                  | no       | -      | no   | no       | no       | no      | no       |
| a part of a file in other keys         | no       | no     | no   | no       | no       | no      | no       |
| recording under an unknown key         | no       | no     | no   | no       | no       | no      | no       |
| JSON lines, a JSON array               | =        | =      | =    | =        | =        | =       | =        |
"""

import copy
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave.data.collate import CheckedCollator, Collator, answer_of, ctc_text_of, features, prompt_of, tokens_of
from soundwave.data.manifest import ManifestError, Sample, read_manifest
from soundwave.evaluation import evaluate
from soundwave.inference.answer import load_model
from soundwave.model.chat import ChatError, Turn, text_of
from soundwave.training.record import _digest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, A, S = "What is said?", "turn it on", "Answer in French."
EARLIER = [("And before?", "Nothing."), ("Who speaks?", "A woman.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, noise, 16_000)
    return folder


def read(folder: Path, *rows: dict, array: bool = False) -> tuple[list[Sample], list[str]]:
    """The samples of rows, and what is said about them."""
    path = folder / "m.jsonl"
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    notes: list[str] = []
    return read_manifest(path, note=notes.append), notes


def one(folder: Path, row: dict) -> Sample:
    ((sample,), _) = read(folder, row)
    return sample


def fault(folder: Path, row: dict) -> str:
    with pytest.raises(ManifestError) as caught:
        read(folder, row)
    message = str(caught.value)
    assert message.splitlines() == [message] and message.startswith(f"{folder / 'm.jsonl'}:1: ")
    return message


def messages(*turns: tuple[str, str], role="role", content="content") -> list[dict]:
    return [{role: turn[0], content: turn[1]} for turn in turns]


ASK = messages(("user", f"<audio>{Q}"), ("assistant", A))
AUDIO = {"audio_filepath": "a.wav"}
PART = {"type": "text", "text": Q}


# --- what is read

TRANSCRIPTIONS = {
    "nemo": {**AUDIO, "duration": 1.0, "text": A},
    "canary-na": {**AUDIO, "text": A, "taskname": "asr", "source_lang": "en", "target_lang": "en", "answer": "na"},
    "canary-task": {**AUDIO, "text": A, "task": "asr", "pnc": "yes", "source_lang": "en-US", "target_lang": "en"},
    "canary-answer": {**AUDIO, "answer": A, "taskname": "asr", "source_lang": "de", "target_lang": "German"},
    "canary-token": {**AUDIO, "text": A, "task": "<|transcribe|>"},
    "empty-answer": {**AUDIO, "text": A, "answer": " "},
    "empty-context": {**AUDIO, "text": A, "context": "", "answer": "na"},
    "none-answer": {**AUDIO, "text": A, "answer": "None"},
    "same-answer": {**AUDIO, "text": A, "answer": "Turn it on."},
    "empty-prompt": {**AUDIO, "text": A, "prompt": "", "task": "transcribe"},
    "hugging-face-text": {"audio": "a.wav", "text": A},
    "hugging-face-sentence": {"audio": {"path": "a.wav", "sampling_rate": 16_000}, "path": "x/a.wav", "sentence": A},
    "hugging-face-path": {"path": "a.wav", "sentence": A},
    "hugging-face-transcription": {"audio": {"path": "a.wav", "bytes": None}, "transcription": A},
    "audio-folder": {"file_name": "a.wav", "transcript": A},
    "list-of-one": {"audio": ["a.wav"], "text": A},
    "slam-llm": {"key": "1", "source": "a.wav", "target": A},
    "slam-llm-task": {"key": "1", "path": "a.wav", "target": A, "task": "ASR"},
    "funasr": {"key": "1", "source": "a.wav", "target": A, "source_len": 90, "target_len": 3},
    "ms-swift-asr": {"messages": ASK, "audios": ["a.wav"], "task": "asr"},
}


@pytest.mark.parametrize("form", TRANSCRIPTIONS)
def test_a_transcription_is_what_the_llm_says_and_what_ctc_writes(folder, form):
    sample = one(folder, TRANSCRIPTIONS[form])
    assert (sample.task, sample.audio, ctc_text_of(sample)) == ("transcribe", folder / "a.wav", A)
    assert answer_of(sample).strip(".").lower() == A


QUESTIONS = {
    "own": {**AUDIO, "task": "voice", "prompt": Q, "answer": A},
    "own-without-task": {**AUDIO, "prompt": Q, "answer": A},
    "own-with-tag": {**AUDIO, "prompt": f"<audio>\n{Q}", "answer": A},
    "salm-context": {**AUDIO, "duration": 1.0, "context": Q, "answer": A},
    "salm-question": {**AUDIO, "question": Q, "answer": A},
    "salm-typed": {
        "conversations": [
            {"from": "User", "value": "a.wav", "type": "audio", "duration": 1.0},
            {"from": "User", "value": Q, "type": "text"},
            {"from": "Assistant", "value": A, "type": "text"},
        ]
    },
    "kimi": {
        "task_type": "understanding",
        "conversation": [
            {"role": "user", "message_type": "audio", "content": "a.wav"},
            {"role": "user", "message_type": "text", "content": Q},
            {"role": "assistant", "message_type": "text", "content": A},
        ],
    },
    "ms-swift": {"messages": ASK, "audios": ["a.wav"]},
    "ms-swift-without-tag": {"messages": messages(("user", Q), ("assistant", A)), "audios": ["a.wav"]},
    "ms-swift-query": {"query": f"<audio>{Q}", "response": A, "audios": ["a.wav"], "history": [], "system": ""},
    "ms-swift-pairs": {"conversation": [{"human": f"<audio>{Q}", "assistant": A}], "audios": ["a.wav"]},
    "sharegpt": {
        "conversations": messages(("human", f"<audio>{Q}"), ("gpt", A), role="from", content="value"),
        "audios": ["a.wav"],
        "tools": "[]",
    },
    "alpaca": {"instruction": "<audio>", "input": Q, "output": A, "audios": ["a.wav"]},
    "alpaca-without-input": {"instruction": f"<audio>{Q}", "input": "", "output": A, "audios": ["a.wav"]},
    "audio-column": {"messages": ASK, "audio": "a.wav"},
    "own-audio-key": {"messages": ASK, **AUDIO},
    "audios-with-path": {"messages": ASK, "audios": [{"path": "a.wav"}]},
    "qwen-parts": {"messages": messages(("user", [{"type": "audio", "audio_url": "a.wav"}, PART]), ("assistant", A))},
    "openai-parts": {
        "messages": messages(
            ("user", [{"type": "audio_url", "audio_url": {"url": "a.wav"}}, PART]),
            ("assistant", [{"type": "text", "text": A}]),
        )
    },
    "parts-and-audios": {
        "messages": messages(("user", [{"type": "audio"}, PART]), ("assistant", A)),
        "audios": ["a.wav"],
    },
    "hugging-face": {"audio": {"path": "a.wav"}, "question": Q, "answer": A},
    "completion": {"audio": "a.wav", "prompt": Q, "completion": A},
    "slam-llm": {"source": "a.wav", "target": A, "prompt": Q},
}


@pytest.mark.parametrize("form", QUESTIONS)
def test_a_question_and_its_answer_are_no_transcript(folder, form, processor):
    sample = one(folder, QUESTIONS[form])
    assert (sample.audio, sample.prompt, sample.answer, sample.text) == (folder / "a.wav", Q, A, None)
    assert sample.task == ("voice" if form == "own" else "chat")
    # What ask would give: the recording, then the question.
    assert processor.prompt_ids(prompt_of(sample)) == processor.prompt_ids(Q)


def test_a_line_with_text_prompt_and_answer_but_no_task_is_no_transcription(folder):
    samples, notes = read(folder, *[{**AUDIO, "text": A, "prompt": "Who speaks?", "answer": "A woman."}] * 2)
    assert {(s.task, s.text, s.answer) for s in samples} == {("chat", A, "A woman.")}
    assert notes == [
        f'{folder / "m.jsonl"}:1: lines with a prompt and an answer, but without "task", get the task "chat"'
    ]


def history(*pairs) -> list[tuple[str, str]]:
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


CHATS = {
    "messages": {
        "messages": messages(("system", S), *history(EARLIER[0]), ("user", f"<audio>{Q}"), ("assistant", A)),
        "audios": ["a.wav"],
    },
    "sharegpt": {
        "conversations": messages(
            *history(EARLIER[0]), ("human", f"<audio>{Q}"), ("gpt", A), role="from", content="value"
        ),
        "system": S,
        "audios": ["a.wav"],
    },
    "query": {"query": f"<audio>{Q}", "response": A, "history": [EARLIER[0]], "system": S, "audios": ["a.wav"]},
    "alpaca": {
        "instruction": f"<audio>{Q}", "output": A, "history": [EARLIER[0]], "system": S, "audios": ["a.wav"]
    },
    "salm": {**AUDIO, "question": f"<audio>{Q}", "answer": A, "system_prompt": S, "history": [EARLIER[0]]},
    "pairs": {
        "system": S,
        "conversation": [
            {"human": EARLIER[0][0], "assistant": EARLIER[0][1]}, {"human": f"<audio>{Q}", "assistant": A}
        ],
        "audio": "a.wav",
    },
    "developer": {
        "messages": messages(("developer", S), *history(EARLIER[0]), ("user", f"<audio>{Q}"), ("assistant", A)),
        "audios": ["a.wav"],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", CHATS)
def test_system_prompts_and_earlier_turns_stay_in_the_prompt(folder, form, processor):
    (sample,), notes = read(folder, CHATS[form])
    assert sample.chat == (
        Turn("system", S),
        Turn("user", EARLIER[0][0]),
        Turn("assistant", EARLIER[0][1]),
        Turn("user", Q, 0),
    )
    assert (sample.prompt, sample.answer, sample.extra) == (Q, A, {})
    assert any("only the last answer is learnt" in note for note in notes)
    batch = Collator(processor, 3)([sample])
    wanted = processor.tokenizer.apply_chat_template(
        [
            *messages(("system", S), *history(EARLIER[0])),
            {"role": "user", "content": f"<|soundwave_audio|>\n{Q}"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    learnt = batch["labels"][0] >= 0
    assert processor.tokenizer.decode(batch["input_ids"][0][~learnt]) == wanted
    assert processor.tokenizer.decode(batch["labels"][0][learnt], skip_special_tokens=True) == A
    assert tokens_of(sample) > tokens_of(sample.model_copy(update={"chat": ()}))


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        pytest.param([("user", "<audio>")], [("user", "", 0)], id="alone"),
        pytest.param([("user", f"{Q}<audio>")], [("user", Q, len(Q))], id="at-the-end"),
        pytest.param([("user", "Listen: <audio> Who?")], [("user", "Listen:  Who?", 8)], id="within"),
        pytest.param(
            [("user", "<audio>"), ("assistant", "Hm?"), ("user", Q)],
            [("user", "", 0), ("assistant", "Hm?", None), ("user", Q, None)],
            id="in-the-first-turn",
        ),
        pytest.param(
            [("user", "Hi"), ("assistant", "Hm?"), ("user", Q)],
            [("user", "Hi", 0), ("assistant", "Hm?", None), ("user", Q, None)],
            id="no-tag",
        ),
    ],
)
def test_the_recording_stands_where_audio_stood(folder, processor, turns, wanted):
    sample = one(folder, {"messages": messages(*turns, ("assistant", A)), "audios": ["a.wav"]})
    chat = sample.chat or (Turn("user", sample.prompt, 0),)
    assert list(chat) == [Turn(*turn) for turn in wanted]
    ids = processor.prompt_ids(prompt_of(sample))
    assert ids.count(processor.audio_placeholder_id) == 1
    before, after = (processor.tokenizer.decode(part) for part in split(ids, processor.audio_placeholder_id))
    for role, content, place in wanted:
        if place is not None:
            assert before.endswith(f"{role}\n{content[:place]}") and after.lstrip("\n").startswith(content[place:])


def split(ids: list[int], at: int) -> tuple[list[int], list[int]]:
    return ids[: ids.index(at)], ids[ids.index(at) + 1 :]


def test_a_recording_alone_is_a_prompt_in_training_and_when_asked(folder, processor):
    sample = one(folder, {"messages": messages(("user", "<audio>"), ("assistant", A)), "audios": ["a.wav"]})
    assert (sample.prompt, sample.chat) == ("", ())
    assert processor.tokenizer.decode(processor.prompt_ids("")).endswith(
        "<|im_start|>user\n<|soundwave_audio|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_words_of_a_chat_never_become_special_tokens(folder, processor):
    words = "stop <|im_end|> <|soundwave_turn_0|> <|soundwave_audio|>"
    turns = [("system", words), ("user", f"<audio>{words}"), ("assistant", words), ("user", words), ("assistant", A)]
    row = {"messages": messages(*turns), "audios": ["a.wav"]}
    harmless = {"messages": messages(*[(r, c.replace(words, "stop")) for r, c in turns]), "audios": ["a.wav"]}
    special = set(processor.tokenizer.all_special_ids)
    kinds = [
        [i for i in processor.prompt_ids(prompt_of(one(folder, given))) if i in special] for given in (row, harmless)
    ]
    assert kinds[0] == kinds[1]
    assert processor.tokenizer.decode(processor.prompt_ids(prompt_of(one(folder, row)))).count(words) == 4


@pytest.mark.parametrize(
    "row",
    [
        {**AUDIO, "text": A, "source_lang": "en", "target_lang": "de", "pnc": "yes"},
        {**AUDIO, "text": A, "source_lang": "en", "target_lang": "de-DE", "taskname": "ast", "answer": "na"},
        {**AUDIO, "text": A, "task": "s2t_translation", "source_lang": "English", "target_lang": "german"},
        {**AUDIO, "text": A, "task": "translate", "target_lang": "<|de|>"},
        {**AUDIO, "answer": A, "source_lang": "en", "target_lang": "de"},
        {"source": "a.wav", "target": A, "source_lang": "en", "target_lang": "de"},
        {"audio": "a.wav", "sentence": A, "src_lang": "en", "tgt_lang": "de"},
    ],
)
def test_a_translation_is_an_answer_and_never_a_ctc_target(folder, row, processor):
    sample = one(folder, row)
    assert (sample.task, answer_of(sample), ctc_text_of(sample)) == ("translate", A, None)
    assert prompt_of(sample) == "Translate the speech into German."
    assert (Collator(processor, 2)([sample])["ctc_labels"] < 0).all()


def test_a_translation_with_a_transcript_of_its_own_keeps_it(folder):
    row = {**AUDIO, "text": "guten tag", "answer": "good day", "source_lang": "de", "target_lang": "en"}
    sample = one(folder, row)
    assert (sample.task, answer_of(sample), ctc_text_of(sample)) == ("translate", "good day", "guten tag")
    sample = one(folder, row | {"prompt": "In English?", "answer": "guten Tag"})
    assert (sample.task, answer_of(sample), ctc_text_of(sample)) == ("chat", "guten Tag", None)


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_every_form_is_read_from_lines_and_from_an_array(folder, array):
    rows = [*TRANSCRIPTIONS.values(), *QUESTIONS.values(), *CHATS.values()]
    samples, _ = read(folder, *rows, array=array)
    alone = [one(folder, row) for row in rows]
    assert [s.model_dump(exclude={"id"}) for s in samples] == [s.model_dump(exclude={"id"}) for s in alone]
    assert len({sample.id for sample in samples}) == len(rows)


# --- arrays


def test_a_sample_of_an_array_is_named_by_its_line(folder):
    path = folder / "demo.json"
    path.write_text(json.dumps([{**AUDIO, "text": A}] * 2, indent=2) + "\n")
    assert [sample.id for sample in read_manifest(path)] == ["demo.json:2", "demo.json:6"]
    path.write_text("\ufeff\n" + json.dumps([{**AUDIO, "text": A}] * 2))
    assert [sample.id for sample in read_manifest(path)] == ["demo.json:2", "demo.json:2, object 2"]


ROW = '{"audio_filepath": "a.wav", "text": "a"}'


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("[]", "demo.json: holds no samples"),
        ("[\n", "demo.json:2: the JSON array is cut off"),
        (f"[\n{ROW},\n", "demo.json:3: the JSON array is cut off"),
        (f"[\n{ROW}\n", "demo.json:3: the JSON array is cut off"),
        (f"[\n{ROW},\n]", 'demo.json:3: a "," stands before the closing "]"'),
        (f"[\n{ROW}\n{ROW}]", "demo.json:3: the objects of an array are divided by commas"),
        (f"[\n{ROW}]\n{ROW}", "demo.json:3: "),
        (f"[\n{ROW},\n{ROW[:20]}", "demo.json:3: is not JSON"),
        (f"[\n{ROW},\n7]", "demo.json:3: is 7, not a JSON object"),
        (f"[\n{ROW},\n[{ROW}]]", "demo.json:3: is [{"),
        (f"[\n{ROW},\n" + '{"audio_filepath": "c.wav", "text": "a"}]', 'demo.json:3: audio_filepath "c.wav" does not'),
        (f"[\n{ROW},\n" + '{"text": "a",\n"text": "b"}]', 'demo.json:3: has the key "text" twice'),
        (f"[\n{ROW},\n" + '{"text": "ü"}]', "demo.json:3: byte 0xfc is not UTF-8"),
        ("[" * 100_000, "demo.json:1: "),
    ],
)
def test_a_damaged_array_is_named_by_its_line(folder, raw, wanted):
    path = folder / "demo.json"
    path.write_bytes(raw.encode("latin-1"))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert wanted in str(caught.value) and len(str(caught.value).splitlines()) == 1


# --- what is refused

NO_ANSWER = messages(("user", f"<audio>{Q}"), ("assistant", A), ("user", "And in German?"))
REFUSED = {
    "last-question-open": ({"messages": NO_ANSWER, "audios": ["a.wav"]}, "ends with a question without an answer"),
    "query-open": ({"query": Q, "audios": ["a.wav"]}, 'has "query" = "What is said?", but no answer; add "answer"'),
    "context-open": ({**AUDIO, "text": A, "context": Q}, 'has "context" = "What is said?", but no answer'),
    "answer-alone": ({**AUDIO, "answer": A}, 'has "answer", but neither "text" nor "prompt"'),
    "two-texts": ({**AUDIO, "text": A, "answer": "light"}, 'has a "text" and another "answer", but no "prompt"'),
    "na-text": ({**AUDIO, "text": "na"}, 'text = "na" is a place-holder; write what is said'),
    "na-answer": ({**AUDIO, "task": "voice", "prompt": Q, "answer": "N/A"}, 'answer = "N/A" is a place-holder'),
    "na-prompt": ({**AUDIO, "context": "na", "answer": A}, 'prompt = "na" is a place-holder'),
    "na-chat": ({"messages": messages(("user", Q), ("assistant", "na"))}, 'answer = "na" is a place-holder'),
    "na-target": ({"source": "a.wav", "target": "na"}, 'text = "na" is a place-holder'),
    "na-ctc-text": ({**AUDIO, "text": A, "ctc_text": "n/a"}, 'ctc_text = "n/a" is a place-holder'),
    "empty-answer": ({"messages": messages(("user", Q), ("assistant", ""))}, 'answer = "" is empty'),
    "empty-turn": (
        {"messages": messages(("user", ""), ("assistant", "a"), ("user", Q), ("assistant", A))},
        "empty user",
    ),
    "asr-of-two-languages": (
        {**AUDIO, "text": A, "task": "asr", "source_lang": "en", "target_lang": "de"},
        '"task": "tr',
    ),
    "ast-of-one-language": (
        {**AUDIO, "text": A, "task": "ast", "source_lang": "en", "target_lang": "en"},
        "from and into",
    ),
    "ast-without-language": ({**AUDIO, "text": A, "taskname": "ast"}, 'lacks "target_lang"'),
    "unknown-languages": ({**AUDIO, "text": A, "source_lang": "eng", "target_lang": "en"}, "write ISO 639-1 codes"),
    "one-language": ({**AUDIO, "text": A, "target_lang": "de"}, 'has "target_lang", but no "source_lang"'),
    "two-tasks": ({**AUDIO, "text": A, "task": "asr", "taskname": "ast"}, "keep one"),
    "two-audios": ({"messages": ASK, "audios": ["a.wav", "b.wav"]}, "one recording a line is read"),
    "two-audio-keys": ({"messages": ASK, "audios": ["a.wav"], "audio": "b.wav"}, '"audios" and "audio", but one'),
    "two-parts": (
        {"messages": messages(("user", [{"type": "audio", "audio": n} for n in ("a.wav", "b.wav")]), ("assistant", A))},
        "names 2 recordings",
    ),
    "two-tags": (
        {"messages": messages(("user", "<audio><audio>"), ("assistant", A)), "audios": ["a.wav"]},
        "has 2 <audio>",
    ),
    "tag-without-audio": ({"task": "qa", "prompt": f"<audio>{Q}", "answer": A}, "prompt has 1 <audio>, but audios 0"),
    "tag-in-an-answer": (
        {"messages": messages(("user", Q), ("assistant", "<audio>")), "audios": ["a.wav"]},
        "the answer has",
    ),
    "tag-in-system": ({"messages": [*messages(("system", "<audio>")), *ASK], "audios": ["a.wav"]}, "in a system turn"),
    "address": ({"messages": ASK, "audios": ["https://x.y/a.wav"]}, 'audios "https://x.y/a.wav" is an address'),
    "data-address": ({"audio": "data:audio/wav;base64,AAAA", "text": A}, "is an address"),
    "bytes": ({"audio": {"path": "a.wav", "bytes": "UklGR"}, "text": A}, "holds the sound of a recording itself"),
    "array": ({"audio": {"path": None, "array": [0.1]}, "text": A}, "holds the sound of a recording itself"),
    "base64": (
        {"messages": messages(("user", [{"type": "input_audio", "input_audio": {"data": "UklGR", "format": "wav"}}]))},
        "holds the sound of a recording itself",
    ),
    "image-part": ({"messages": messages(("user", [PART, {"type": "image_url"}]))}, 'part of type "image_url"'),
    "images": ({"messages": ASK, "audios": ["a.wav"], "images": ["a.png"]}, 'has the key "images"'),
    "image-tag": ({"messages": messages(("user", "<image>What?"), ("assistant", A))}, 'has "<image>"'),
    "tools": ({"messages": ASK, "audios": ["a.wav"], "tools": [{"name": "f"}]}, 'has the key "tools"'),
    "tool-role": ({"messages": [*ASK, *messages(("tool", "3"))], "audios": ["a.wav"]}, 'role "tool"'),
    "function-call": (
        {"conversations": messages(("function_call", "f"), role="from", content="value")},
        '"function_call"',
    ),
    "observation": ({"conversations": messages(("observation", "f"), role="from", content="value")}, '"observation"'),
    "tool-calls": ({"messages": [ASK[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}, '"tool_calls"'),
    "bad-answer": ({"messages": ASK, "audios": ["a.wav"], "label": False}, 'says "label": false'),
    "kto": ({"messages": ASK, "audios": ["a.wav"], "kto_tag": False}, 'says "kto_tag": false'),
    "no-loss": ({"messages": [ASK[0], ASK[1] | {"loss": False}], "audios": ["a.wav"]}, 'says "loss": false'),
    "preferences": ({"prompt": Q, "chosen": "a", "rejected": "b"}, "is a pair of preferences"),
    "ranking": ({"instruction": Q, "output": ["a", "b"]}, 'output = ["a", "b"]; write a string'),
    "choices": ({"audio": "a.wav", "question": Q, "choices": ["a", "b"], "answer": "a"}, 'has the key "choices"'),
    "late-system": ({"messages": [*ASK, *messages(("system", S)), *ASK], "audios": ["a.wav"]}, "is not the first"),
    "system-twice": (
        {"messages": [*messages(("system", S)), *ASK], "system": S, "audios": ["a.wav"]},
        '"system" is given',
    ),
    "two-users": ({"messages": [*messages(("user", "Hi")), *ASK], "audios": ["a.wav"]}, "two messages of role"),
    "two-chats": ({"messages": ASK, "conversations": ASK, "audios": ["a.wav"]}, 'has both "messages" and "conv'),
    "chat-and-query": ({"messages": ASK, "query": Q, "audios": ["a.wav"]}, '"query" is given twice'),
    "two-prompts": ({**AUDIO, "question": Q, "context": "b", "answer": A}, 'has both "question" and "context"'),
    "two-transcripts": ({"audio": "a.wav", "sentence": "a", "transcription": "b"}, "which differ"),
    "history-of-strings": (
        {"query": Q, "response": A, "history": ["a", "b"]},
        'write a list of ["question", "answer"]',
    ),
    "open-history": ({"query": Q, "response": A, "history": [["a", None]]}, "history = "),
    "mark-of-qwen": ({**AUDIO, "question": "<|audio_bos|><|AUDIO|><|audio_eos|>What?", "answer": A}, "<|audio_bos|>"),
    "mark-of-nemo": ({**AUDIO, "question": "<|audioplaceholder|> What?", "answer": A}, "write <audio> where"),
    "mark-of-salmonn": ({**AUDIO, "prompt": "<Speech><SpeechHere></Speech> What?", "answer": A}, '"<Speech>"'),
    "path-in-tags": ({"query": "<audio>a.wav</audio>What?", "response": A, "audios": ["a.wav"]}, '"</audio>"'),
    "start": ({**AUDIO, "text": A, "start": 1.5, "end": 2.5}, 'has "start" = 1.5, which is not read; write "offset"'),
    "end": ({"audio": "a.wav", "text": A, "start_time": 0, "end_time": 900}, 'write "offset" and "duration"'),
    "audio-in-a-message": (
        {"messages": [ASK[0] | {"audio": "a.wav"}, ASK[1]]},
        '"audio"; name the recording in "audios"',
    ),
    "path-as-a-prompt": ({"query": "a.wav", "response": A}, 'query has "a.wav", the name of a sound file'),
    "spoken-answer": (
        {"messages": [ASK[0], ASK[1] | {"content": "b.wav"}], "audios": ["a.wav"]},
        "the name of a sound",
    ),
    "unknown-audio-key": ({"wav": "a.wav", "question": Q, "answer": A}, '"wav" = "a.wav"; write "audio_filepath"'),
    "line-break-in-a-key": ({"wa\x85v\n": "a.wav", "text": A}, '"wa\\u0085v\\n" = "a.wav"; write "audio_filepath"'),
    "lhotse": ({"id": "1", "start": 0, "recording": {}, "supervisions": []}, "is a cut of Lhotse"),
    "input-output": ({"input": "a.wav", "output": "b"}, '"input" = "a.wav" and "output"; write "audio_filepath"'),
    "wenet": ({"key": "1", "wav": "a.wav", "txt": A}, '"wav" = "a.wav"; write "audio_filepath"'),
    "path-as-an-input": (
        {"instruction": "Write it.", "input": "a.wav", "output": A},
        'instruction has "a.wav", the name',
    ),
    "list-under-a-key": ({"data": [{**AUDIO, "text": A}]}, 'holds a list under "data"; write its objects one a line'),
    "caption-alone": (
        {"audio": "a.wav", "caption": A},
        '"caption", but no text; write "text" for what is said, or "task"',
    ),
    "user-and-assistant": ({"audio": "a.wav", "user": Q, "assistant": A}, '"user", but no text; write "text" for what'),
    "taskname-as-number": ({**AUDIO, "text": A, "taskname": 7}, "taskname = 7; write a string"),
    "answer-as-number": ({**AUDIO, "text": A, "answer": 5}, "answer = 5: "),
    "txt": ({"audio": "a.wav", "txt": A}, 'has the unknown key "txt"; write "text"'),
    "caption": ({"audio": "a.wav", "caption": A, "task": "caption", "prompt": Q}, 'write "answer"'),
    "part-in-audio": (
        {"audio": {"path": "a.wav", "start_time": 0.2}, "text": A},
        'audio has "start_time" = 0.2; write',
    ),
    "offset-in-audio": ({"audio": {"path": "a.wav", "offset": 0, "duration": 1}, "text": A}, 'write "offset" and'),
    "part-of-a-part": (
        {"messages": messages(("user", [{"type": "audio", "audio": "a.wav", "end": 1}, PART]), ("assistant", A))},
        'messages has "end" = 1; write "offset" and "duration" beside messages',
    ),
    "no-loss-scale": ({"messages": [ASK[0], ASK[1] | {"loss_scale": 0.0}], "audios": ["a.wav"]}, '"loss_scale": 0.0'),
    "not-trained": ({"messages": [ASK[0], ASK[1] | {"train": False}], "audios": ["a.wav"]}, 'says "train": false'),
    "bad-answer-as-text": ({"messages": ASK, "audios": ["a.wav"], "label": "False"}, 'says "label": "False"'),
    "segments": ({"audio": "a.wav", "sentences": [{"start": 0, "text": A}]}, 'lacks "text", which task "transcribe"'),
    "lhotse-supervision": ({"recording_id": "1", "start": 0.0, "text": A, "language": "en"}, 'lacks "audio_filepath"'),
    "lhotse-recording": ({"sources": [{"source": "a.wav"}], "duration": 1.0}, 'lacks "audio_filepath"'),
    "voxpopuli": ({"audio_id": "1", "audio": "a.wav", "language": 9, "raw_text": A}, '"raw_text"; write "text"'),
    "misspelt-context": ({**AUDIO, "contxt": Q, "answer": A, "task": "voice"}, 'write "context"'),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_misread_is_refused_by_name(folder, kind):
    row, wanted = REFUSED[kind]
    assert wanted in fault(folder, row)


# --- what is said

SAID = {
    "na": ({**AUDIO, "text": A, "answer": "na"}, 'answer = "na" is a place-holder: the text is taken'),
    "pnc": ({**AUDIO, "text": A, "pnc": "no"}, '"pnc" is passed over'),
    "locale": ({**AUDIO, "text": A, "locale": "de"}, '"locale" is passed over: languages are read from "source_lang"'),
    "rejected": (
        {"messages": ASK, "audios": ["a.wav"], "rejected_response": "no"},
        '"rejected_response" is passed over',
    ),
    "worse": ({"messages": ASK, "audio": "a.wav", "rejected_messages": [1]}, '"rejected_messages" is passed over'),
    "thinking": ({"messages": [ASK[0], ASK[1] | {"thinking": "Hm"}], "audios": ["a.wav"]}, '"thinking" of messages'),
    "two-names": (
        {**AUDIO, "task": "v", "prompt": Q, "context": "x", "answer": A},
        '"context" is passed over, because',
    ),
    "transcript": ({**AUDIO, "text": A, "transcript": "other"}, '"transcript" is passed over, because "text"'),
    "other-sound": ({**AUDIO, "text": A, "speaker_prompt": "b.wav"}, '"speaker_prompt" names another sound file'),
    "translation": ({"audio": "a.wav", "sentence": A, "translation": "x"}, '"translation" is passed over'),
    "mark": ({**AUDIO, "text": f"<|zh|><|NEUTRAL|>{A}"}, 'text has "<|zh|>"; such marks are learnt as they stand'),
    "mark-in-an-answer": ({**AUDIO, "task": "v", "prompt": Q, "answer": "<|0.00|>"}, 'answer has "<|0.00|>"; such'),
    "own-images": ({**AUDIO, "text": A, "images": ["a.png"]}, '"images" is passed over'),
    "ctc": ({**AUDIO, "text": A, "source_lang": "en", "target_lang": "de"}, "the LLM learns it and CTC does not"),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_passed_over_is_said_once_with_its_line(folder, kind):
    row, wanted = SAID[kind]
    _, notes = read(folder, {**AUDIO, "text": "first"}, row, row)
    assert [wanted in note for note in notes].count(True) == 1
    assert all(note.startswith(f"{folder / 'm.jsonl'}:2: ") and len(note.splitlines()) == 1 for note in notes)


def test_without_a_listener_it_is_a_warning_at_the_callers_line(folder):
    (folder / "m.jsonl").write_text(json.dumps(SAID["pnc"][0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_manifest(folder / "m.jsonl")
    assert [(w.filename, "pnc" in str(w.message)) for w in caught] == [(__file__, True)]


def test_our_own_form_says_nothing(folder):
    rows = [{**AUDIO, "text": A, "speaker": "anna"}, {"task": "qa", "prompt": Q, "answer": A, "source": "squad"}]
    assert read(folder, *rows)[1] == []


# --- runs


def test_a_run_of_version_0_1_knows_its_samples_again_and_a_chat_counts():
    sample = Sample(id="m.jsonl:1", audio=None, task="qa", prompt="?", answer="a", extra={"k": 1})
    assert _digest([sample]) == "d9e6fa15a0a9a980"  # as 0.1.0 wrote it
    assert _digest([sample.model_copy(update={"chat": (Turn("system", S), Turn("user", "?"))})]) != _digest([sample])


# --- templates that cannot write a chat


def test_a_chat_that_the_template_cannot_write_is_left_out_by_name(folder):
    from soundwave import backbones
    from soundwave.model.processing import SoundwaveProcessor

    processor = SoundwaveProcessor.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL)
    template = processor.tokenizer.chat_template
    sample = one(folder, CHATS["messages"])
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    dropping = template.replace("for message in messages", "for message in messages[messages | length > 1:]")
    for broken, reason in ((refusing, "no system role"), (dropping, "writes 3 of its 4 turns")):
        processor.tokenizer.chat_template = broken
        with pytest.raises(ChatError, match=reason):
            processor.prompt_ids(sample.chat)
        batch = CheckedCollator(processor, 2)([sample, one(folder, {**AUDIO, "text": A})])
        (left_out,) = batch["left_out"]
        assert (left_out.sample, left_out.file) == ("m.jsonl:1", str(folder / "a.wav")) and reason in left_out.reason
        with pytest.raises(ValueError, match=reason):
            features(processor, sample)


def test_an_evaluation_leaves_such_a_chat_out_and_answers_the_others(folder, model_folders):
    model, processor = load_model(model_folders[3])
    samples = [one(folder, row) for row in (CHATS["messages"], {**AUDIO, "text": A})]
    assert len(evaluate(model, processor, samples, max_new_tokens=2).answers) == 2
    processor.tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
        + processor.tokenizer.chat_template
    )
    scores = evaluate(model, processor, samples, max_new_tokens=2)
    assert len(scores.answers) == 1 and "one turn only" in scores.left_out[0].reason
    for strict, chosen in ((True, samples), (False, samples[:1])):
        with pytest.raises(ValueError, match="m.jsonl:1: the language model's chat template cannot write"):
            evaluate(model, processor, chosen, max_new_tokens=2, strict=strict)


def test_a_chat_needs_as_many_places_as_recordings(processor):
    with pytest.raises(ValueError, match="1 places for a recording"):
        processor.prompt_ids([Turn("user", "Hi", 0)], has_audio=False)
    with pytest.raises(ValueError, match="0 places for a recording"):
        processor.prompt_ids([Turn("user", "Hi")])


# --- whatever comes
#
# Each text of a random sample has a word of its own, so that it is seen where it ends up. A line that is read must have
# the question in the prompt, the answer in the answer and the turns in their order, whatever was done to it before;
# and no word may be lost without a note, unless it stands under a key that the sample keeps.


def random_row(rng: random.Random) -> tuple[dict, dict[str, str]]:
    """A line in a random form, and its words: what each text of it is."""
    words = {
        kind: f"{kind}{rng.randrange(10**6)}é" for kind in ("question", "answer", "system", "asked", "told", "text")
    }
    spoken, chatty = rng.random() < 0.8, rng.random() < 0.5
    tag = rng.choice(["<audio>", "<audio>\n", ""]) if spoken else ""
    question, answer = f"{tag}{words['question']}", words["answer"]
    system = {"system": words["system"]} if chatty else {}
    audio = {"audios": ["a.wav"]} if spoken else {}
    turns = [*([("system", words["system"])] if chatty else [])]
    turns += [("user", words["asked"]), ("assistant", words["told"])] if chatty else []
    turns += [("user", question), ("assistant", answer)]
    past = {"history": [[words["asked"], words["told"]]]} if chatty else {}
    sharegpt = [({"user": "human", "assistant": "gpt"}.get(role, role), content) for role, content in turns]
    parts = [(role, [{"type": "text", "text": content}] if role == "user" else content) for role, content in turns]
    own = {**({"audio_filepath": "a.wav"} if spoken else {})}
    forms = [
        {**own, "task": "voice", "prompt": question, "answer": answer, **system, **past},
        {**own, "context": question, "answer": answer, **past},
        {"messages": messages(*turns), **audio},
        {"messages": messages(*parts), **audio},
        {"conversations": messages(*sharegpt, role="from", content="value"), **audio},
        {"query": question, "response": answer, **system, **past, **audio},
        {"instruction": question, "input": "", "output": answer, **system, **past, **audio},
        {"audio_filepath": "a.wav", "text": words["text"], "answer": "na", "source_lang": "en", "target_lang": "en"},
        {"audio_filepath": "a.wav", "text": words["text"], "source_lang": "en", "target_lang": "de"},
        {"audio": {"path": "a.wav"}, "sentence": words["text"]},
        {"source": "a.wav", "target": words["text"]},
    ]
    return rng.choice(forms), words


JUNK = [
    None,
    True,
    False,
    0,
    -1,
    7.5,
    float("nan"),
    "",
    " ",
    "na",
    "a.wav",
    "<audio>",
    [],
    {},
    [[]],
    [{}],
    {"path": "b.wav"},
]
NAMES = [
    "prompt",
    "answer",
    "text",
    "messages",
    "audios",
    "audio",
    "query",
    "response",
    "output",
    "role",
    "from",
    "content",
]
NAMES += [
    "value",
    "system",
    "history",
    "task",
    "taskname",
    "source",
    "target",
    "offset",
    "type",
    "images",
    "tools",
    "xyzzy",
]
ROLES = ["user", "assistant", "system", "tool", "gpt", "human", "observation", "", 3]


def containers(value) -> list:
    """All lists and objects within a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict | list) else []) + [one for item in inner for one in containers(item)]


def damage(row: dict, rng: random.Random) -> None:
    """Change one place of a line, at any depth."""
    place = rng.choice([one for one in containers(row) if one] or [row])
    if not place:
        return
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    action = rng.choice(["drop", "junk", "rename", "wrap", "swap", "double", "role", "add", "typo"])
    if action == "drop":
        del place[key]
    elif action == "junk":
        place[key] = copy.deepcopy(rng.choice(JUNK))
    elif action == "wrap":
        place[key] = rng.choice([[place[key]], {"value": place[key]}, [place[key], place[key]], str(place[key])])
    elif isinstance(place, list):
        if action == "double":
            place.insert(rng.randrange(len(place) + 1), copy.deepcopy(place[key]))
        else:
            rng.shuffle(place)
    elif action == "role" and place.keys() & {"role", "from"}:
        place[sorted(place.keys() & {"role", "from"})[0]] = rng.choice(ROLES)
    elif action == "typo" and len(key) > 3:
        at = rng.randrange(len(key))
        place[key[:at] + key[at + 1 :]] = place.pop(key)
    elif action == "add":
        place[rng.choice(NAMES)] = copy.deepcopy(rng.choice(JUNK))
    else:
        place[rng.choice(NAMES)] = place.pop(key)


def as_bytes(rows: list[dict], rng: random.Random) -> bytes:
    array, plain = rng.random() < 0.4, rng.random() < 0.5
    if array:
        text = json.dumps(rows, ensure_ascii=plain, indent=rng.choice([None, 1]))
    else:
        text = rng.choice(["\n", "\r\n", "\n\n"]).join(json.dumps(row, ensure_ascii=plain) for row in rows)
    raw = text.encode(rng.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-8-sig", "utf-16", "latin-1"]))
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw))]
    if rng.random() < 0.05:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + rng.randbytes(rng.randrange(1, 4)) + raw[at:]
    return raw


MEANT = {
    "prompt": {"prompt", "query", "question", "context", "instruction", "input", "system", "history"},
    "answer": {"answer", "response", "output", "target"},
    "text": {"text", "sentence"},
}
MAY_BE = {"prompt": {"prompt"}, "answer": {"answer", "text"}, "text": {"text", "answer"}}


def check_sample(sample: Sample, row: dict, words: dict[str, str], notes: list[str], processor) -> None:
    """The independent check of a sample that was read from a whole line."""
    line = json.dumps(row, ensure_ascii=False)
    where = {"prompt": text_of(prompt_of(sample)), "answer": answer_of(sample), "text": sample.text or ""}
    kept = json.dumps(
        [sample.extra, sample.task, sample.ctc_text, sample.source_lang, sample.target_lang], ensure_ascii=False
    )
    lost_is_said = any("passed over" in note or "names another" in note for note in notes)
    for kind, word in words.items():
        if word not in line:
            continue
        found = {name for name, text in where.items() if word in text}
        assert found or word in kept or lost_is_said, f"{kind} is lost"
        keys = {key for key, value in row.items() if isinstance(value, str) and word in value}
        roles = [role for role, names in MEANT.items() if keys & names]
        allowed = set().union(*(MAY_BE[role] for role in roles)) if roles else {"prompt", "answer"}
        assert found <= allowed, f"{kind} of {keys} is in {found}"
    assert where["answer"].strip() or (sample.task, sample.text) == ("transcribe", where["answer"]), "no answer"
    assert where["answer"].strip().lower() not in ("na", "n/a")
    if "messages" in row or "conversations" in row:
        order = [word for word in sorted(words.values(), key=line.rfind) if word in line]
        shown = where["prompt"] + "\n" + where["answer"]
        assert [word for word in sorted(words.values(), key=shown.rfind) if word in shown] == [
            w for w in order if w in shown
        ]
        assert order[-1] in where["answer"], "the last turn is the answer"
    assert (sample.audio is not None) == ("a.wav" in line or "b.wav" in line) or "a.wav" in kept + shown_texts(where)
    ids = processor.prompt_ids(prompt_of(sample), has_audio=sample.audio is not None)
    assert ids.count(processor.audio_placeholder_id) == (sample.audio is not None)


def shown_texts(where: dict[str, str]) -> str:
    return " ".join(where.values())


def test_random_manifests_are_read_as_meant_or_refused_in_one_line(folder, fuzz, processor):
    read_whole = 0
    for seed in range(fuzz(300)):
        rng = random.Random(seed)
        pairs = [random_row(rng) for _ in range(rng.randrange(1, 4))]
        rows = [row for row, _ in pairs]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            damage(rng.choice(rows), rng)
        raw = as_bytes(rows, rng)
        (folder / "fuzz.jsonl").write_bytes(raw)
        notes: list[str] = []
        left_out: list[str] = []
        try:
            samples = read_manifest(
                folder / "fuzz.jsonl", note=notes.append, leave_out=lambda *left, kept=left_out: kept.append(left[0])
            )
        except ManifestError as error:
            assert str(error).splitlines() == [str(error)], seed
            assert str(error).startswith(str(folder / "fuzz.jsonl")), seed
            continue
        assert all(len(note.splitlines()) == 1 for note in notes), seed
        try:
            whole = [json.loads(line) for line in json_lines(raw)]
        except ValueError:
            pytest.fail(f"seed {seed}: what is no JSON was read")
        assert len(samples) + len(left_out) == len(whole), seed
        if left_out or whole != rows:
            continue
        for sample, (row, words) in zip(samples, pairs, strict=True):
            try:
                check_sample(sample, row, words, notes, processor)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}\n{row}\n{sample}\n{notes}") from None
            read_whole += 1
    assert read_whole > fuzz(300) // 4  # else the damage is such that nothing is checked


def json_lines(raw: bytes) -> list[str]:
    """The objects of a manifest as texts, found with nothing of the reader's."""
    text = raw.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return [json.dumps(row, ensure_ascii=False) for row in json.loads(text)]
    return [line for line in text.splitlines() if line.strip()]
