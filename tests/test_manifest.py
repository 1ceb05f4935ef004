"""Manifests: every form is read, and every fault is one line with file, line number and how to mend it."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soundwave.data.manifest import KEYS, ManifestError, read_manifest, write_manifest

ROW = {"audio_filepath": "a.wav", "text": "turn it on"}


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(160, np.float32), 16_000)
    return tmp_path


def write(folder: Path, *rows: dict | str | bytes) -> Path:
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    lines = [line.encode() if isinstance(line, str) else line for line in lines]
    path = folder / "m.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def fault(path: Path, **options) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# --- what is read


def test_answer_of_a_transcription_defaults_to_its_text(folder):
    (sample,) = read_manifest(write(folder, ROW))
    assert (sample.task, sample.text, sample.prompt, sample.answer) == (
        "transcribe",
        "turn it on",
        None,
        "turn it on",
    )


def test_audio_is_absolute_and_id_is_name_and_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder, ROW, ROW)
    second = read_manifest("m.jsonl")[1]
    assert (second.id, second.audio) == ("m.jsonl:2", folder / "a.wav")


def test_every_known_key_lands_in_its_field_and_others_in_extra(folder):
    values = {
        **{"audio_filepath": "a.wav", "offset": 0.5, "duration": 2, "text": "guten tag", "task": "translate"},
        **{"prompt": "In English?", "answer": "good day", "source_lang": "de", "target_lang": "en"},
        "ctc_text": "guten tag male",
    }
    assert set(values) == set(KEYS)
    (sample,) = read_manifest(write(folder, values | {"speaker": "anna"}))
    expected = {key: value for key, value in values.items() if key != "audio_filepath"}
    assert {key: getattr(sample, key) for key in expected} == expected
    assert sample.extra == {"speaker": "anna"}


def test_sample_without_audio_is_text_only(folder):
    (sample,) = read_manifest(write(folder, {"task": "qa", "prompt": "2 + 2?", "answer": "4"}))
    assert (sample.audio, sample.prompt, sample.answer) == (None, "2 + 2?", "4")


def test_null_counts_as_absent(folder):
    (sample,) = read_manifest(write(folder, ROW | {"offset": None, "duration": None, "answer": None, "note": None}))
    assert (sample.offset, sample.duration, sample.answer, sample.extra) == (0.0, None, "turn it on", {})


def test_empty_transcript_is_silence(folder):
    assert read_manifest(write(folder, ROW | {"text": ""}))[0].answer == ""


MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "<audio>Who speaks?"},
        {"role": "assistant", "content": "A woman."},
    ],
    "audios": ["a.wav"],
}


def test_messages_give_last_prompt_and_answer(folder):
    (sample,) = read_manifest(write(folder, MESSAGES))
    assert (sample.task, sample.prompt, sample.answer) == ("chat", "Who speaks?", "A woman.")
    assert (sample.audio, sample.text, sample.extra) == (folder / "a.wav", None, {})


def test_messages_without_audios_are_text_only(folder):
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (sample,) = read_manifest(write(folder, {"messages": messages}))
    assert (sample.audio, sample.prompt, sample.answer) == (None, "2 + 2?", "4")


def test_messages_that_transcribe_give_the_text(folder):
    (sample,) = read_manifest(write(folder, MESSAGES | {"task": "transcribe"}))
    assert (sample.text, sample.answer) == ("A woman.", "A woman.")


def test_slam_llm_transcription(folder):
    (sample,) = read_manifest(write(folder, {"key": "u1", "source": "a.wav", "target": "hello"}))
    assert (sample.audio, sample.text, sample.answer) == (folder / "a.wav", "hello", "hello")
    assert sample.extra == {"key": "u1"}


def test_slam_llm_other_task(folder):
    row = {"source": "a.wav", "target": "happy", "task": "emotion", "prompt": "How do they feel?"}
    (sample,) = read_manifest(write(folder, row))
    assert (sample.text, sample.answer) == (None, "happy")


def test_source_and_target_beside_own_keys_are_extra_keys(folder):
    (sample,) = read_manifest(write(folder, ROW | {"source": "radio", "target": "phone"}))
    assert (sample.text, sample.extra) == ("turn it on", {"source": "radio", "target": "phone"})


def test_source_of_a_text_only_sample_is_an_extra_key(folder):
    row = {"task": "qa", "prompt": "2 + 2?", "answer": "4", "source": "squad"}
    assert read_manifest(write(folder, row))[0].extra == {"source": "squad"}


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\xef\xbb\xbf%s\n%s\n", id="byte-order-mark"),
        pytest.param(b"%s\r\n%s\r\n", id="crlf"),
        pytest.param(b"%s\n%s", id="no-last-newline"),
        pytest.param(b"%s\n%s\n\n  \n\r\n", id="blank-lines-at-the-end"),
        pytest.param(b"\xef\xbb\xbf\n\n%s\n\n%s\n", id="blank-lines-between"),
    ],
)
def test_tolerated(folder, raw):
    line = json.dumps(ROW | {"text": "schön"}, ensure_ascii=False).encode()
    assert [sample.text for sample in read_manifest(write(folder, raw % (line, line)))] == ["schön"] * 2


def test_an_id_is_one_line_whatever_the_manifest_is_called(folder):
    (folder / "a\nb.jsonl").write_text(json.dumps(ROW) + "\n")
    assert read_manifest(folder / "a\nb.jsonl")[0].id == "'a\\nb.jsonl':1"
    (folder / "a\nb.jsonl").write_text(json.dumps(ROW | {"audio_filepath": "missing.wav"}) + "\n")
    left_out = []
    read_manifest(folder / "a\nb.jsonl", leave_out=lambda *fault: left_out.append(fault))
    assert left_out[0][0] == "'a\\nb.jsonl':1"


def test_line_numbers_count_blank_lines(folder):
    assert "m.jsonl:4: is not JSON" in fault(write(folder, ROW, "", "", "oops"))


# --- files that are no manifests


def test_missing_manifest(tmp_path):
    path = tmp_path / "no.jsonl"
    assert fault(path) == f"{path}: does not exist; name a manifest (.jsonl)"


def test_folder_as_manifest(tmp_path):
    assert fault(tmp_path) == f"{tmp_path}: is a folder; name a manifest (.jsonl) in it"


@pytest.mark.parametrize("raw", [b"", b"\n \r\n", b"\xef\xbb\xbf"], ids=["nothing", "blank-lines", "byte-order-mark"])
def test_empty_manifest(folder, raw):
    assert "m.jsonl: holds no samples; " in fault(write(folder, raw))


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.ogg", "x.mp3"])
def test_audio_file_as_manifest(tmp_path, name):
    soundfile.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    message = fault(tmp_path / name)
    assert name in message and "one JSON object on each line" in message


def test_utf16_manifest(folder):
    path = folder / "m.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-16")
    assert fault(path).endswith("m.jsonl: is UTF-16 text; save it as UTF-8")


def test_latin1_manifest(folder):
    raw = json.dumps(ROW | {"text": "schön"}, ensure_ascii=False).encode("latin-1")
    assert "m.jsonl:2: byte 0xf6 is not UTF-8; save" in fault(write(folder, ROW, raw))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("m.xlsx", b"PK\x03\x04\0", "a spreadsheet"),
    ],
)
def test_files_of_other_kinds_are_named(folder, name, text, wanted):
    (folder / name).write_bytes(text)
    message = fault(folder / name)
    assert f"{name}: is {wanted}" in message and "one JSON object on each line" in message and "(audio?)" not in message


@pytest.mark.parametrize("line", ["oops", "one, two", "key: text, more"])
def test_text_without_a_header_is_no_table(folder, line):
    assert "m.jsonl:1: is not JSON" in fault(write(folder, line))


def test_json_lines_may_be_called_csv(folder):
    (folder / "m.csv").write_bytes(write(folder, ROW).read_bytes())
    assert len(read_manifest(folder / "m.csv")) == 1


# --- lines that are no samples


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        pytest.param("{'text': 1}", "is not JSON (Expecting property name enclosed in double quotes at", id="quotes"),
        pytest.param('{"text": "a"', "one JSON object on each line", id="cut-off"),
        pytest.param("{", "one JSON object on each line", id="pretty-printed-object"),
        pytest.param("[", "begins a JSON array; write its objects one a line", id="pretty-printed-array"),
        pytest.param('[{"text": "a"}]', "is a JSON array; write its objects one a line", id="array"),
        pytest.param('"hello"', 'is "hello", not a JSON object', id="string"),
        pytest.param("[" * 100_000, "JSON", id="deep"),
        pytest.param('{"duration": ' + "9" * 5000 + "}", "number is too long", id="endless-number"),
        pytest.param('{"text": "\\ud800"}', "half of a surrogate pair", id="lone-surrogate"),
        pytest.param("{}", 'lacks "audio_filepath", which task "transcribe" needs', id="empty-object"),
        pytest.param('{"wav": "a.wav", "said": "a"}', '"wav" = "a.wav"; write "audio_filepath"', id="keys-of-others"),
        pytest.param('{"heard": 1, "said": "a"}', 'add it to the keys ["heard", "said"]', id="unknown-keys"),
        pytest.param('{"audio_filepath": "a.wav"}', 'lacks "text"', id="no-text"),
        pytest.param('{"audio_filepath": "a.wav", "task": "voice", "prompt": "?"}', 'lacks "answer"', id="no-answer"),
        pytest.param('{"audio_filepath": "a.wav", "task": "voice", "answer": "a"}', 'lacks "prompt"', id="no-prompt"),
        pytest.param('{"task": "qa", "prompt": " ", "answer": "a"}', 'prompt = " " is empty', id="blank-prompt"),
    ],
)
def test_bad_line(folder, line, wanted):
    message = fault(write(folder, ROW, line))
    assert message.startswith(f"{folder / 'm.jsonl'}:2: ") and wanted in message


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param({"duration": 0}, "duration = 0: ", id="zero-duration"),
        pytest.param({"duration": -1.5}, "duration = -1.5: ", id="negative-duration"),
        pytest.param({"duration": float("nan")}, "duration = NaN: ", id="nan-duration"),
        pytest.param({"duration": float("inf")}, "duration = Infinity: ", id="infinite-duration"),
        pytest.param({"duration": "2.1"}, 'duration = "2.1": ', id="duration-as-string"),
        pytest.param({"duration": True}, "duration = true: ", id="duration-as-bool"),
        pytest.param({"offset": -0.1}, "offset = -0.1: ", id="negative-offset"),
        pytest.param({"offset": float("inf")}, "offset = Infinity: ", id="infinite-offset"),
        pytest.param({"offset": float("nan")}, "offset = NaN: ", id="nan-offset"),
        pytest.param({"text": 7}, "text = 7: ", id="number-as-text"),
        pytest.param({"task": ["voice"], "prompt": "?", "answer": "a"}, 'task = ["voice"]: ', id="list-as-task"),
        pytest.param({"task": ""}, 'lacks "prompt"', id="empty-task"),
        pytest.param({"target_lang": 1}, "target_lang = 1: ", id="number-as-language"),
        pytest.param({"audio_filepath": 7}, "audio_filepath 7 is not a string; ", id="number-as-path"),
        pytest.param({"audio_filepath": "b.wav"}, 'audio_filepath "b.wav" does not exist; ', id="missing-audio"),
        pytest.param({"audio_filepath": "."}, 'audio_filepath "." is not a file; ', id="folder-as-audio"),
        pytest.param({"audio_filepath": ""}, 'audio_filepath = "" is empty; ', id="empty-path"),
        pytest.param({"audio_filepath": "a\0.wav"}, "cannot be opened (embedded null byte)", id="null-byte"),
        pytest.param({"audio_filepath": "a" * 5000}, "cannot be opened (", id="endless-path"),
        pytest.param({"audio_filepath": "a\nb\u2028.wav"}, "a\\nb\\u2028.wav", id="line-break-in-path"),
    ],
)
def test_bad_value(folder, change, wanted):
    message = fault(write(folder, ROW | change))
    assert message.startswith(f"{folder / 'm.jsonl'}:1: ") and wanted in message and "; " in message
    assert len(message) < len(str(folder)) + 250


@pytest.mark.parametrize(
    ("row", "nearest"),
    [
        pytest.param({"audio_filpath": "a.wav", "text": "a"}, "audio_filepath", id="needed"),
        pytest.param({"audio_path": "a.wav", "text": "a"}, "audio_filepath", id="needed-other-name"),
        pytest.param({"mesages": [], "audios": []}, "messages", id="other-form"),
        pytest.param(ROW | {"ofset": 1.0}, "offset", id="optional"),
        pytest.param(ROW | {"Duration": 1.0}, "duration", id="capital"),
    ],
)
def test_misspelt_key_names_the_nearest(folder, row, nearest):
    assert f'write "{nearest}", or rename it' in fault(write(folder, row))


def test_key_near_a_present_one_is_an_extra_key(folder):
    assert read_manifest(write(folder, ROW | {"texts": ["a"]}))[0].extra == {"texts": ["a"]}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        pytest.param({"audios": ["a.wav", "a.wav"]}, "write a list of one path", id="two-audios"),
        pytest.param({"audios": "a.wav"}, "write a list of one path", id="audios-as-string"),
        pytest.param({"audios": []}, "messages has 1 <audio>, but audios 0 paths", id="tag-without-audio"),
        pytest.param({"messages": "hi"}, 'messages = "hi"; write a list', id="messages-as-string"),
        pytest.param({"messages": []}, 'messages has none with role "user"', id="no-messages"),
        pytest.param({"messages": [{"role": "user", "content": "hi"}]}, 'role "assistant"', id="no-assistant"),
        pytest.param({"messages": [{"role": "user", "content": [1]}]}, "= [1]; write a string", id="content-as-list"),
        pytest.param({"answer": "A man."}, '"answer" is given twice', id="answer-twice"),
    ],
)
def test_bad_messages(folder, change, wanted):
    assert wanted in fault(write(folder, MESSAGES | change))


# --- paths


def test_empty_audio_file(folder):
    (folder / "a.wav").write_bytes(b"")
    assert 'audio_filepath "a.wav" is an empty file; ' in fault(write(folder, ROW))


@pytest.mark.parametrize("name", ["../a.wav", "x/../../a.wav", "absolute"])
def test_path_out_of_the_folder_is_refused_unless_allowed(folder, name):
    name = str(folder / "a.wav") if name == "absolute" else name
    (folder / "inner").mkdir()
    path = write(folder / "inner", ROW | {"audio_filepath": name})
    assert "leads out of the manifest's folder; " in fault(path)
    assert read_manifest(path, allow_outside=True)[0].audio == folder / "a.wav"


def test_sibling_folder_with_the_same_beginning_is_outside(folder):
    (folder / "set").mkdir()
    (folder / "set2").mkdir()
    assert "leads out" in fault(write(folder / "set", ROW | {"audio_filepath": "../set2/a.wav"}))


def test_absolute_path_inside_the_folder_is_accepted(folder):
    path = write(folder, ROW | {"audio_filepath": str(folder / "a.wav")})
    assert read_manifest(path)[0].audio == folder / "a.wav"


def test_symbolic_link_to_within_the_folder_is_followed(folder):
    (folder / "linked.wav").symlink_to(folder / "a.wav")
    path = write(folder, ROW | {"audio_filepath": "linked.wav"})
    assert read_manifest(path)[0].audio == folder / "linked.wav"


# --- writing


def test_written_rows_are_read_again(folder):
    rows = [ROW | {"text": "schön\u2028 \n"}, {"task": "qa", "prompt": "?", "answer": "a"}]
    write_manifest(folder / "m.jsonl", rows)
    first, second = read_manifest(folder / "m.jsonl")
    assert (first.text, second.answer) == ("schön\u2028 \n", "a")


def test_failed_write_leaves_the_old_manifest_alone(folder):
    path = write(folder, ROW)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_manifest(path, ({"text": str(1 / n)} for n in (1, 0)))
    assert path.read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["a.wav", "m.jsonl"]


def test_write_makes_the_folder(tmp_path):
    write_manifest(tmp_path / "x" / "y" / "m.jsonl", [{"text": "a"}])
    assert (tmp_path / "x" / "y" / "m.jsonl").read_text() == '{"text": "a"}\n'


# --- whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NEARLY = st.dictionaries(
    st.sampled_from([*KEYS, "messages", "audios", "source", "target", "txt"]),
    JSON
    | st.sampled_from(["a.wav", "transcribe", "voice", 1.0, 10**400, "\ud800", ["a.wav"]])
    | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), JSON | st.sampled_from(["user", "assistant"]))),
)


@given(st.binary() | st.lists(JSON.map(json.dumps) | NEARLY.map(json.dumps)).map(lambda rows: "\n".join(rows).encode()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_samples_or_one_line(folder, raw):
    path = write(folder, raw)
    try:
        samples = read_manifest(path)
    except ManifestError as error:
        message = str(error)
        assert message.splitlines() == [message] and message.startswith(str(path))
    else:
        assert all(sample.answer is not None for sample in samples)
