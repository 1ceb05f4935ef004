"""Tables, folders, Parquet, Arrow, cuts and gzip as manifests: what is read, and what is refused by name.

`tests/data/readers` was written by lhotse and datasets themselves.
"""

import gzip
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import soundfile

from soundwave.data import members, tables
from soundwave.data.audio import AudioError, load_audio, seconds_of
from soundwave.data.index import open_index
from soundwave.data.manifest import ManifestError, read_manifest
from soundwave.data.members import Member, member_of, split_member
from soundwave.data.readers import source_of
from soundwave.data.samples import Samples

DATA = Path(__file__).parent / "data" / "readers"
TEXTS = ["turn it on", "turn it off", "what time is it", "stop"]
RATE = 16_000
LINKED = "/etc/hostname"
AUDIO = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def tone(number: int) -> np.ndarray:
    return load_audio(DATA / "wav" / f"{number}.flac")


@pytest.fixture
def folder(tmp_path):
    record(tmp_path / "a.wav")
    return tmp_path


def record(path: Path, samples: int = 1600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(samples) / 10), RATE)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, **options) -> list:
    return read_manifest(path, note=lambda line: None, **options)


def fault(path: Path, **options) -> str:
    with pytest.raises(ManifestError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def entries(path: Path) -> dict[str, str]:
    """Each place with the text of its row, or what is wrong with it."""
    found = {}
    for place, row in source_of(path).entries():
        found[place] = str(row) if isinstance(row, Exception) else row["text"]
    return found


# --- data sets as other libraries write them


@pytest.mark.parametrize("name", ["cuts.jsonl.gz", "shar", "hf", "hf.parquet", "hf/data-00000-of-00002.arrow"])
def test_sound_and_text_are_those_that_were_saved(name):
    samples = read(DATA / name)
    assert [sample.text for sample in samples] == TEXTS[: len(samples)]
    assert len(samples) == (2 if name.endswith(".arrow") else 4)
    for number, sample in enumerate(samples):
        sound = load_audio(sample.audio, offset=sample.offset, duration=sample.duration)
        assert np.array_equal(sound, tone(number))
        assert seconds_of(sample.audio) == len(sound) / RATE


@pytest.mark.parametrize(
    ("name", "first", "audio"),
    [
        ("hf.parquet", "hf.parquet:row 0", "hf.parquet#audio[0]"),
        ("hf", "hf:data-00000-of-00002.arrow, row 0", "data-00000-of-00002.arrow#audio[0]"),
        ("shar", "shar:cuts.000000.jsonl.gz, line 1", "recording.000000.tar#0"),
        ("cuts.jsonl.gz", "cuts.jsonl.gz:1", "0.flac"),
    ],
)
def test_place_and_name_of_a_recording(name, first, audio):
    sample = read(DATA / name)[0]
    assert (sample.id, sample.audio.name) == (first, audio)


def test_numbers_of_labels_become_their_names():
    assert [sample.extra["speaker"] for sample in read(DATA / "hf.parquet")] == ["anna", "ben", "anna", "ben"]


def test_a_line_of_json_may_name_a_row(tmp_path):
    shutil.copy(DATA / "hf.parquet", tmp_path / "t.parquet")
    (sample,) = read(write(tmp_path / "m.jsonl", '{"audio_filepath": "t.parquet#audio[2]", "text": "time"}'))
    assert np.array_equal(load_audio(sample.audio), tone(2))


@pytest.mark.parametrize("kind", ["name", "link"])
@pytest.mark.parametrize("member", ["#audio[0]", "#0"])
def test_a_recording_inside_a_file_must_not_lie_outside(tmp_path, kind, member):
    source = DATA / ("hf.parquet" if "audio" in member else "shar/recording.000000.tar")
    outside, inner = tmp_path / source.name, tmp_path / "in"
    shutil.copy(source, outside)
    inner.mkdir()
    if kind == "link":
        (inner / source.name).symlink_to(outside)
    name = ("../" if kind == "name" else "") + source.name + member
    path = write(inner / "m.jsonl", json.dumps({"audio_filepath": name, "text": "x"}))
    assert "of the manifest's folder" in fault(path)
    assert len(load_audio(read(path, allow_outside=True)[0].audio)) == 3200


# --- names of recordings inside files


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("a/b.parquet#audio[12]", Member("a/b.parquet", "audio", 12)),
        ("a#1/b.ARROW#my sound[0]", Member("a#1/b.ARROW", "my sound", 0)),
        ("s.tar#1024", Member("s.tar", "", 1024)),
        ("song #1.wav", None),
        ("b.parquet#audio", None),
        ("b.parquet#audio[-1]", None),
        ("s.tar.gz#12", None),
    ],
)
def test_name_of_a_member(name, member):
    assert member_of(name) == member
    assert split_member(name) == ((name, "") if member is None else (member.file, name[len(member.file) :]))
    assert member is None or str(member) == name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hf.parquet#audio[4]", "has 4 rows, so there is no row 4"),
        ("hf.parquet#sound[0]", "has no column 'sound'; its columns are audio, text, speaker"),
        ("hf.parquet#text[0]", "holds no files in its column 'text', but string"),
        ("hf/data-00000-of-00002.arrow#audio[2]", "has 2 rows, so there is no row 2"),
        ("shar/recording.000000.tar#512", "has no member at byte 512: the archive has changed"),
        ("shar/recording.000000.tar#99999999", "has no member at byte 99999999"),
        ("none.parquet#audio[0]", "does not exist"),
    ],
)
def test_a_member_that_is_not_there_is_named(name, wanted):
    with pytest.raises(AudioError) as caught:
        load_audio(DATA / name)
    assert wanted in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_container_is_an_error_with_its_name(tmp_path, kind, seed):
    source = (
        DATA
        / {"parquet": "hf.parquet", "arrow": "hf/data-00000-of-00002.arrow", "tar": "shar/recording.000000.tar"}[kind]
    )
    data, rng = bytearray(source.read_bytes()), random.Random(seed)
    if seed % 2:
        data = data[: rng.randrange(8, len(data))]
    else:
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)
    path = write(tmp_path / source.name, bytes(data))
    for at in (0, 1) if kind != "tar" else (0, 3072):
        try:
            load_audio(f"{path}#{at}" if kind == "tar" else f"{path}#audio[{at}]")
        except AudioError as error:
            assert str(path) in str(error)
    if kind != "tar":
        try:
            read(path)
        except ManifestError as error:
            assert source.name in str(error)


# --- tables


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("m.csv", "audio_filepath,text\na.wav,one\n", ["one"]),
        ("m.csv", '\ufeffaudio_filepath,text\r\na.wav,"one, two"\r\na.wav,"say ""hi"""\r\n', ["one, two", 'say "hi"']),
        ("m.csv", 'audio_filepath,text\na.wav,"two\nlines"\n\na.wav,three\n', ["two\nlines", "three"]),
        ("m.csv", ",audio_filepath,text\n0,a.wav,one\n", ["one"]),  # with an index, as pandas writes it
        ("m.CSV", "path;sentence\na.wav;eins, zwei\n", ["eins, zwei"]),
        ("m.jsonl", '\ufeff"path";"sentence"\n"a.wav";"one"\n', ["one"]),
        (
            "m.tsv",
            'path\tsentence\na.wav\t"He said ""hi""."\na.wav\t"Only at the start\n',
            ['He said "hi".', '"Only at the start'],
        ),
        ("metadata.csv", "file_name,transcription\na.wav,one\n", ["one"]),
    ],
)
def test_tables(folder, name, text, wanted):
    samples = read(write(folder / name, text))
    assert [sample.text for sample in samples] == wanted
    assert {sample.audio for sample in samples} == {folder / "a.wav"}


def test_place_in_a_table_is_the_line_on_which_a_row_begins(folder):
    path = write(folder / "m.csv", 'audio_filepath,text\na.wav,"two\nlines"\na.wav,three\n')
    assert [sample.id for sample in read(path)] == ["m.csv:2", "m.csv:4"]


def test_seconds_in_a_table_are_numbers(folder):
    (sample,) = read(write(folder / "m.csv", "audio_filepath,offset,duration,text\na.wav,0,0.05,7\n"))
    assert (sample.offset, sample.duration, sample.text) == (0.0, 0.05, "7")


def test_common_voice(folder):
    record(folder / "clips" / "c.wav")
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\tlocale\tsegment\n"
    (sample,) = read(write(folder / "train.tsv", header + "x\tc.wav\t1f\tTurn it on.\t2\t\ten\t\n"))
    assert (sample.audio, sample.text) == (folder / "clips" / "c.wav", "Turn it on.")
    assert sample.extra == {"client_id": "x", "sentence_id": "1f", "up_votes": "2", "locale": "en"}


def test_words_for_the_task_and_place_holders_are_understood(folder):
    (sample,) = read(write(folder / "m.csv", "audio_filepath,text,task,answer\na.wav,one,asr,na\n"))
    assert (sample.task, sample.answer) == ("transcribe", "one")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (b"a.wav", "has 1 fields, but the header names 3"),
        (b"a.wav,one,,,", "has 5 fields, but the header names 3"),
        (b"a.wav,l\xf6,", "byte 0xf6 is not UTF-8"),
        (b"a.wav,,1", 'has an empty cell in the column "text"'),
        (b"a.wav,n/a,1", 'text = "n/a" is a place-holder'),
        (b'a.wav,"one" more,1', "is no row of CSV"),
        (b"a.wav,one,long", 'duration = "long": Input should be a valid number'),
        (b"a.wav,one,-1", 'duration = "-1": Input should be a valid number'),
        (b"../x.wav,one,1", 'audio_filepath "../x.wav" leads out of the manifest\'s folder'),
        (b"b.wav,one,1", 'audio_filepath "b.wav" does not exist'),
        (b",one,1", 'lacks "audio_filepath"'),
        (b"a.wav,o\0e,1" + b" " * 70_000, "holds a null byte"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(folder, row, wanted):
    path = write(
        folder / "m.csv",
        b"audio_filepath,text,duration\na.wav,good," + b" " * 70_000 + b"\n" + row + b"\na.wav,good,\n",
    )
    assert f"m.csv:3: {wanted}" in fault(path)
    places = list(source_of(path).entries())
    assert [place for place, _ in places] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.wav,one\n", 'm.csv:1: its first line "a.wav,one" names no column; write a header'),
        ("audio_filepath,text,text\na.wav,a,b\n", 'm.csv:1: has the column "text" twice'),
        ('audio_filepath,text\na.wav,"one\na.wav,two\n', "m.csv:2: is no row of CSV, which goes on over 1 lines"),
        ("audio_filepath,text\n", "m.csv: holds no samples"),
        ("", "holds no samples"),
    ],
)
def test_a_bad_table_is_named(folder, text, wanted):
    assert wanted in fault(write(folder / "m.csv", text))


def test_a_line_without_end_is_not_read_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    path = write(folder / "m.csv", b"audio_filepath,text\na.wav,one\na.wav," + b"x" * 5000)
    assert "m.csv:3: has more than" in fault(path)


# --- gzip


@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.gz", "m.jsonl"])
def test_json_lines_in_gzip(folder, name):
    text = '{"audio_filepath": "a.wav", "text": "one"}\n\n{"audio_filepath": "a.wav", "text": "two"}\n'
    samples = read(write(folder / name, gzip.compress(text.encode())))
    assert [(sample.id, sample.text) for sample in samples] == [(f"{name}:1", "one"), (f"{name}:3", "two")]


def test_a_table_in_gzip(folder):
    assert read(write(folder / "m.csv.gz", gzip.compress(b"audio_filepath,text\na.wav,one\n")))[0].text == "one"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (gzip.compress(b'{"audio_filepath": "a.wav", "text": "one"}\n' * 9)[:-20], "is cut short or damaged"),
        (gzip.compress(b"[]"), "is a JSON array, compressed; uncompress it"),
        (gzip.compress(b"RIFF\0\0"), "holds a binary file or UTF-16 text, compressed"),
        (gzip.compress(b""), "holds no samples"),
    ],
    ids=["cut short", "array", "binary", "empty"],  # else the bytes, which hold the time of day, would name the tests
)
def test_bad_gzip_is_named(folder, data, wanted):
    assert wanted in fault(write(folder / "m.jsonl.gz", data))


# --- folders


def test_recordings_with_a_text_beside_each(tmp_path):
    for name in ("b/2", "a/1"):
        record(tmp_path / f"{name}.wav")
        write(tmp_path / f"{name}.txt", f"\ufeffword {name}\r\n")
    write(tmp_path / "README.txt", "about")
    write(tmp_path / ".hidden.txt", "x")
    samples = read(tmp_path)
    assert [(sample.id, sample.text) for sample in samples] == [
        (f"{tmp_path.name}:a/1.wav", "word a/1"),
        (f"{tmp_path.name}:b/2.wav", "word b/2"),
    ]


def test_bad_recordings_of_a_folder_are_named(tmp_path):
    for name in "abcde":
        record(tmp_path / f"{name}.wav")
    record(tmp_path / "c.flac")
    write(tmp_path / "b.txt", " \n")
    write(tmp_path / "c.txt", "c")
    write(tmp_path / "d.txt", b"l\xf6")
    (tmp_path / "e.txt").symlink_to(LINKED)
    write(tmp_path / "f.txt", "f")
    assert entries(tmp_path) == {
        "a.wav": 'has no text: "a.txt" is not there; write it, or move the recording away',
        "b.wav": '"b.txt" is empty; write what is said, or move it and its recording away',
        "c.flac": '"c.flac" and "c.wav" have one text; keep one of them',
        "d.wav": '"d.txt": byte 0xf6 is not UTF-8; save it as UTF-8 text',
        "e.wav": f'"e.txt" is a symbolic link out of its folder, to "{os.path.realpath(LINKED)}"; copy the file',
        "f.txt": 'has no recording: none is named "f" with .wav or the like; move it away',
    }


def test_a_pipe_in_a_folder_is_not_opened(tmp_path):
    record(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "a.txt")
    assert entries(tmp_path) == {"a.wav": '"a.txt" is a folder, a pipe or a device; write the words into a file'}


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    record(tmp_path / "a\nb.wav")
    write(tmp_path / "a\nb.txt", "words")
    (sample,) = read(tmp_path)
    assert sample.id.endswith(":'a\\nb.wav'") and sample.audio.name == "a\nb.wav"


def test_librispeech(tmp_path):
    for name in ("84-1-0000", "84-1-0001", "84-1-0003"):
        record(tmp_path / "84" / "1" / f"{name}.flac")
    write(tmp_path / "84/1/84-1.trans.txt", "84-1-0000 GO DO\n84-1-0001\n84-1-0002 GONE\n")
    assert entries(tmp_path) == {
        "84/1/84-1.trans.txt, line 1": "GO DO",
        "84/1/84-1.trans.txt, line 2": 'has no words after the name "84-1-0001"; write what is said',
        "84/1/84-1.trans.txt, line 3": "GONE",
        "84/1/84-1-0001.flac": 'has no line in "84/1/84-1.trans.txt"; add one, or move the recording away',
        "84/1/84-1-0003.flac": 'has no line in "84/1/84-1.trans.txt"; add one, or move the recording away',
    }
    left = []
    for wanted in ("0001", "0003"):
        (tmp_path / f"84/1/84-1-{wanted}.flac").unlink()
    write(tmp_path / "84/1/84-1.trans.txt", "84-1-0000 GO DO\n84-1-0002 GONE\n")
    assert [sample.text for sample in read(tmp_path, leave_out=lambda *line: left.append(line))] == ["GO DO"]
    assert left[0][1] == "84/1/84-1-0002.flac"


@pytest.mark.parametrize("named", ["folder", "file"])
def test_ljspeech(tmp_path, named):
    record(tmp_path / "wavs" / "LJ001-0001.wav")
    path = write(tmp_path / "metadata.csv", 'LJ001-0001|He said "2|He said "two\n')
    (sample,) = read(tmp_path if named == "folder" else path)
    assert (sample.id, sample.text) == ("metadata.csv:1", 'He said "two')


def test_parts_of_one_split(tmp_path):
    rows = pyarrow.parquet.read_table(DATA / "hf.parquet")
    pyarrow.parquet.write_table(rows.slice(0, 3), tmp_path / "train-00000-of-00002.parquet")
    pyarrow.parquet.write_table(rows.slice(3), tmp_path / "train-00001-of-00002.parquet")
    samples = read(tmp_path)
    assert [sample.text for sample in samples] == TEXTS
    assert samples[3].id == f"{tmp_path.name}:train-00001-of-00002.parquet, row 0"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            ["train-0.parquet", "test-0.parquet"],
            "holds Parquet files of several names; name one of them: test-0.parquet",
        ),
        (["train.tsv", "test.tsv"], "holds manifests; name one of them: test.tsv, train.tsv"),
        (["a.wav"], "is a folder of recordings without texts; put a .txt file beside each"),
        (["cuts.000000.jsonl.gz"], "has cuts of Lhotse, but no archives recording.*.tar"),
        (["cuts.000000.jsonl.gz", "recording.000001.tar"], "do not belong together"),
        (["state.json", "data.arrow"], "its state.json is damaged"),
        (["notes.md"], "is a folder; name a manifest (.jsonl) in it"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(tmp_path, files, wanted):
    for name in files:
        write(tmp_path / name, "x")
    assert wanted in fault(tmp_path)


def test_splits_of_a_data_set_are_named(tmp_path):
    write(tmp_path / "dataset_dict.json", "{}")
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
    assert "holds splits; name one of them: test/, train/" in fault(tmp_path)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/hostname", "gone.arrow"])
def test_a_data_set_names_only_its_own_files(tmp_path, name):
    shutil.copytree(DATA / "hf", tmp_path / "hf")
    write(tmp_path / "hf" / "state.json", json.dumps({"_data_files": [{"filename": name}]}))
    assert "its state.json names" in fault(tmp_path / "hf")


def test_this_folder_has_a_name(tmp_path, monkeypatch):
    record(tmp_path / "a.wav")
    write(tmp_path / "a.txt", "words")
    monkeypatch.chdir(tmp_path)
    assert read(Path("."))[0].id == f"{tmp_path.name}:a.wav"


@pytest.mark.parametrize("make", [lambda path: path / "b.txt", lambda path: path / "b.wav"], ids=["text", "recording"])
def test_stamp_of_a_folder_changes_with_its_files(tmp_path, make):
    record(tmp_path / "a.wav")
    write(tmp_path / "a.txt", "words")
    before = source_of(tmp_path).stamp()
    assert source_of(tmp_path).stamp() == before
    write(make(tmp_path), "x")
    assert source_of(tmp_path).stamp() != before


# --- Parquet


def clip(number: int) -> bytes:
    return (DATA / "wav" / f"{number}.flac").read_bytes()


def table(path: Path, columns: dict, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_recordings_as_bytes_as_paths_and_neither(folder):
    shutil.copy(DATA / "wav" / "0.flac", folder / "0.flac")
    values = [
        {"bytes": clip(1), "path": "1.flac"},
        {"bytes": None, "path": "0.flac"},
        {"bytes": None, "path": None},
        None,
    ]
    path = table(folder / "t.parquet", {"audio": pyarrow.array(values, AUDIO), "text": TEXTS})
    found = dict(source_of(path).entries())
    assert found["row 0"] == {"audio_filepath": "t.parquet#audio[0]", "text": TEXTS[0]}
    assert found["row 1"] == {"audio_filepath": "0.flac", "text": TEXTS[1]}
    assert "has no recording in its column" in str(found["row 2"]) and "has no recording" in str(found["row 3"])
    assert np.array_equal(load_audio(folder / "t.parquet#audio[0]"), tone(1))


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_a_column_of_plain_bytes(tmp_path, kind):
    path = table(tmp_path / "t.parquet", {"sound": pyarrow.array([clip(3)], kind), "text": ["stop"]})
    assert np.array_equal(load_audio(read(path)[0].audio), tone(3))


def test_paths_in_a_column(folder):
    path = table(folder / "t.parquet", {"audio_filepath": ["a.wav"], "text": ["one"], "duration": [0.05]})
    (sample,) = read(path)
    assert (sample.audio, sample.duration) == (folder / "a.wav", 0.05)


OTHERS = {
    "uuid": pyarrow.array([b"0123456789abcdef"], pyarrow.uuid()),
    "timestamp": pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns", "UTC")),
    "time": pyarrow.array([1_700_000_000_123], pyarrow.time64("ns")),
    "time-span": pyarrow.array([1_700_000_000_123], pyarrow.duration("ns")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_columns_that_json_or_python_do_not_have(folder, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    columns = {"audio_filepath": ["a.wav"], "text": ["one"], "more": OTHERS[kind]}
    table(folder / "t.parquet", columns)
    with pyarrow.ipc.new_file(folder / "t.arrow", pyarrow.table(columns).schema) as file:
        file.write(pyarrow.table(columns))
    for path in (folder / "t.parquet", folder / "t.arrow"):
        (sample,) = Samples([open_index(path)])
        assert isinstance(sample.extra["more"], str)


def test_only_small_parts_of_a_column_are_in_memory(tmp_path, monkeypatch):
    """Reading in order goes through the file once, whatever the size of a row group; a step back begins it again."""
    path = table(
        tmp_path / "t.parquet",
        {"audio": pyarrow.array([{"bytes": clip(i % 4)} for i in range(100)]), "text": ["x"] * 100},
        row_group_size=50,
    )
    most, begun = 0, []
    kind = members._ParquetColumn
    value, iter_batches = kind.value, pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, row):
        nonlocal most
        found = value(self, row)
        most = max(most, len(self.rows))
        return found

    def counted(self, *arguments, **options):
        begun.append(options["row_groups"])
        return iter_batches(self, *arguments, **options)

    monkeypatch.setattr(kind, "value", watched)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    for row in [*range(100), 99, 60, 3]:
        assert len(load_audio(f"{path}#audio[{row}]")) == 3200 + 160 * (row % 4)
    assert most <= members.ROWS_AT_ONCE
    assert begun == [[0], [1], [1], [0]]


def test_a_file_that_was_replaced_is_opened_anew(tmp_path):
    path = table(tmp_path / "t.parquet", {"audio": pyarrow.array([{"bytes": clip(0)}]), "text": ["x"]})
    assert len(load_audio(f"{path}#audio[0]")) == 3200
    table(path, {"audio": pyarrow.array([{"bytes": clip(3)}]), "text": ["x"]})
    assert len(load_audio(f"{path}#audio[0]")) == 3680


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"text": ["one"], "speaker": ["a"]}, "has no column with recordings, but text, speaker; add one, audio"),
        (
            {"audio": [{"array": [0.1, 0.2], "sampling_rate": 16000}], "text": ["a"]},
            "holds samples of sound as numbers",
        ),
        ({"one": [b"x"], "two": [b"x"], "text": ["a"]}, "has recordings in the columns one, two; keep one"),
        ({"au[d]io": [b"x"], "text": ["a"]}, 'has its recordings in the column "au[d]io"; give it another name'),
        ({"audio": [b"x"], "text": [None]}, 'row 0: lacks "text"'),
    ],
)
def test_parquet_that_cannot_be_read_is_named(tmp_path, columns, wanted):
    message = fault(table(tmp_path / "t.parquet", columns))
    assert message.startswith(f"{tmp_path / 't.parquet'}:") and wanted in message


def test_questions_without_recordings(tmp_path):
    (sample,) = read(table(tmp_path / "t.parquet", {"prompt": ["2 + 2?"], "answer": ["4"], "task": ["qa"]}))
    assert (sample.audio, sample.prompt, sample.answer) == (None, "2 + 2?", "4")


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("t.jsonl", b"PAR1\0\0", "is a Parquet file; name it t.parquet"),
        ("t.parquet", b"PAR1\0\0", "is no Parquet file, or cut short or damaged"),
        ("t.parquet", b"{}", "is no Parquet file, or damaged"),
        ("t.arrow", b"{}", "is no Arrow file, or cut short or damaged"),
        ("t.feather", b"ARROW1\0\0", "is an Arrow file; name it t.arrow"),
    ],
)
def test_other_files_by_those_names(tmp_path, name, data, wanted):
    assert wanted in fault(write(tmp_path / name, data))


def test_without_pyarrow_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'soundwave-fused[parquet]'" in fault(DATA / "hf.parquet")


# --- Lhotse


def cut(**changes) -> dict:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "sampling_rate": RATE,
                 "num_samples": 1600, "duration": 0.1, "channel_ids": [0]}  # fmt: skip
    supervision = {"id": "s", "recording_id": "r", "start": 0, "duration": 0.1, "channel": 0, "text": "one"}
    whole = {"id": "c", "start": 0.0, "duration": 0.1, "channel": 0, "supervisions": [supervision],
             "recording": recording, "type": "MonoCut"}  # fmt: skip
    return whole | changes


def changed(**changes) -> dict:
    return cut(recording=cut()["recording"] | changes)


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
def test_a_first_cut_may_be_long(folder, name):
    raw = json.dumps(cut(note="x" * 100_000)).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert len(read(folder / name)) == 1


def test_a_cut_with_several_supervisions_is_a_sample_for_each(folder):
    parts = [
        {"start": -0.01, "duration": 0.03, "text": "one", "speaker": "a"},
        {"start": 0.02, "duration": 0.05, "text": "two", "language": "de", "custom": {"task": "transcribe"}},
    ]
    path = write(folder / "cuts.jsonl", json.dumps(cut(start=0.01, duration=0.06, supervisions=parts)))
    one, two = read(path)
    assert (one.id, one.offset, one.duration, one.text) == ("cuts.jsonl:1, supervision 1", 0.01, 0.02, "one")
    assert (two.offset, two.duration, two.text, two.source_lang) == (0.03, 0.04, "two", "de")


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (changed(sources=[{"type": "command", "source": "rm -rf /"}]), "made by a command, which is never run"),
        (changed(sources=[{"type": "url", "source": "http://x/a.wav"}]), 'of the type "url", but only files are read'),
        (changed(channel_ids=[0, 1]), "means one of the channels [0, 1]"),
        (changed(transforms=[{"name": "Speed"}]), 'is transformed, ["Speed"], which is not done here'),
        (cut(type="MixedCut", tracks=[]), 'of the kind "MixedCut", but only MonoCut is read'),
        (cut(supervisions=[]), 'its "supervisions" are empty'),
        (cut(supervisions=[{"start": 0, "duration": 1}]), 'has no "text"'),
        (cut(recording=None), "without a recording"),
        (cut(duration="1"), 'duration = "1"; write seconds'),
        (changed(sources=[{"type": "file", "source": "../x.wav"}]), "leads out of the manifest's folder"),
        ({"audio_filepath": "a.wav", "text": "one"}, "is no cut of Lhotse"),
    ],
)
def test_a_cut_that_cannot_be_read_is_named(folder, row, wanted):
    path = write(folder / "cuts.jsonl", json.dumps(cut()) + "\n" + json.dumps(row))
    assert wanted in fault(path) and "cuts.jsonl:2: " in fault(path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("fewer", "recording.000000.tar ends before line 2 of cuts.000000.jsonl"),
        ("more", "has more recordings than cuts.000000.jsonl has cuts"),
        ("other", 'line 1 of cuts.000000.jsonl is the cut "c0"'),
        ("not tar", "is no tar archive, or damaged"),
        ("none", "without a recording in its archive"),
    ],
)
def test_shar_that_does_not_fit_is_named(tmp_path, change, wanted):
    placeholder = cut()["recording"] | {"sources": [{"type": "shar", "channels": [0], "source": ""}]}
    cuts = [cut(id=f"c{number}", recording=placeholder) for number in range(2)]
    write(tmp_path / "cuts.000000.jsonl", "\n".join(map(json.dumps, cuts)))
    names = {"fewer": ["c0.flac"], "more": ["c0.flac", "c1.flac", "c2.flac"], "other": ["x.flac"]}
    with tarfile.open(tmp_path / "recording.000000.tar", "w") as archive:
        for name in names.get(change, ["c0.nodata", "c0.nometa", "c1.nodata", "c1.nometa"]):
            info = tarfile.TarInfo(name)
            info.size = len(clip(0))
            archive.addfile(info, io.BytesIO(clip(0)))
    if change == "not tar":
        write(tmp_path / "recording.000000.tar", "no archive" * 100)
    assert wanted in fault(tmp_path)
