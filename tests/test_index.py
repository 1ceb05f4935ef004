"""The index of a manifest: the same samples and refusals as without, whatever happens to it.

Manifests of the tests are small: `indexed` takes the threshold away and cuts them into ranges of a few lines, which two
processes read.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave.data import index as index_module
from soundwave.data import scan as scan_module
from soundwave.data import source as source_module
from soundwave.data.collate import CheckedCollator, LeftOut, tokens_of
from soundwave.data.index import index_files, open_index
from soundwave.data.manifest import ManifestError, Sample, read_manifest
from soundwave.data.samples import Samples, TrainingSet
from soundwave.data.sampling import BucketBatchSampler, paper_temperature
from soundwave.data.selection import SampleError, select_samples
from soundwave.training.journal import Journal
from soundwave.training.lineage import data_of
from soundwave.training.record import _digest

FORK = multiprocessing.get_context("fork")
ROW = {"audio_filepath": "a.wav", "text": "turn it on"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with recordings of 0.5 and 31 s, an empty one and one that is no audio; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inside = tmp_path / "data"
    (inside / "b").mkdir(parents=True)
    soundfile.write(inside / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8_000), 16_000)
    soundfile.write(inside / "long.wav", np.zeros(31 * 8_000), 8_000)
    shutil.copy(inside / "a.wav", inside / "b" / "c.wav")
    (inside / "empty.wav").touch()
    (inside / "noise.wav").write_bytes(b"RIFF but no audio" * 10)
    return inside


@pytest.fixture
def indexed(monkeypatch):
    """indexed(True) gives every manifest an index, indexed(False) none."""

    def switch(on):
        monkeypatch.setattr(index_module, "SMALL", 0 if on else 1 << 20)
        monkeypatch.setattr(scan_module, "RANGE", 600)
        monkeypatch.setattr(index_module, "_cores", lambda: 2)

    switch(True)
    return switch


MIXED = [
    ROW,
    ROW | {"duration": 0.4, "license": "CC0"},
    "",
    {"task": "qa", "prompt": "2 + 2?", "answer": "4"},
    {"task": "qa", "prompt": "2 + 3?", "answer": "5", "duration": 3.0},
    ROW | {"audio_filepath": "gone.wav"},
    ROW | {"audio_filepath": "long.wav"},
    ROW | {"audio_filepath": "noise.wav", "task": "voice", "prompt": "Who?", "answer": "Anna"},
    ROW | {"audio_filepath": "empty.wav"},
    ROW | {"offset": 0.75},
    ROW | {"audio_filepath": "b/c.wav", "text": "schön, 光"},
    ROW | {"audio_filepath": "b/../b/c.wav", "offset": 0.25, "ctc_text": " "},
    {
        "messages": [{"role": "user", "content": "<audio>?"}, {"role": "assistant", "content": "A."}],
        "audios": ["a.wav"],
    },
    ROW | {"text": ""},
    ROW | {"speaker": "anna", "images": ["x"], "licence": "MIT"},
]


def write(path: Path, rows, end="\n", begin=b"") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(begin + "".join(line + end for line in lines).encode())
    return path


def chosen(path: Path, stage: int, **options):
    """All that selecting samples of a manifest gives and tells."""
    left_out, notes = [], []
    selection = select_samples([path], left_out, stage=stage, note=notes.append, **options)
    samples = selection.samples
    return {
        "samples": list(samples),
        "figures": selection[1:],
        "left out": left_out,
        "notes": [note for note in notes if not note.startswith("index")],
        "seconds": [None if np.isnan(length) else length for length in samples.seconds()],
        "tokens": samples.tokens().tolist(),
        "tasks": samples.tasks(),
        "told of the data": data_of(samples),
        "digest of 0.2": _digest(samples, "0123456789abcdef"),
    }


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def index_of(path: Path) -> Path:
    return index_files(path)[0]


# --- the same as without


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("end", "begin"), [("\n", b""), ("\r\n", b"\xef\xbb\xbf")], ids=["plain", "crlf-and-byte-order-mark"]
)
def test_an_index_gives_and_tells_the_same_at_each_start(folder, indexed, monkeypatch, stage, end, begin):
    path = write(folder / "m.jsonl", MIXED * 3, end, begin)
    indexed(False)
    wanted = chosen(path, stage)
    assert len(wanted["samples"]) > 10 and len(wanted["left out"]) > 10 and wanted["notes"]
    assert files_of(folder.parent) == {"data"} | {f"data/{name}" for name in files_of(folder)}  # nothing was written
    indexed(True)
    assert chosen(path, stage) == wanted
    monkeypatch.setattr(index_module, "_make", None)  # the second start makes none
    assert chosen(path, stage) == wanted


def test_lengths_are_those_of_the_samples(folder, indexed):
    samples = select_samples([write(folder / "m.jsonl", MIXED)], [], stage=2, note=len).samples
    assert samples.tokens().tolist() == [tokens_of(sample) for sample in samples]
    assert [sample.duration if sample.audio else None for sample in samples] == [
        None if np.isnan(length) else length for length in samples.seconds()
    ]


def test_samples_are_those_of_read_manifest(folder, indexed):
    path = write(folder / "m.jsonl", [row for row in MIXED if "gone" not in str(row) and "empty" not in str(row)])
    index = open_index(path)
    for found, read in zip(Samples([index]), read_manifest(path, note=len), strict=True):
        assert found.model_copy(update={"duration": read.duration}) == read


@pytest.mark.parametrize("blank", ["\xa0", "\u3000", "\x0c", "\x1c", "\x85"], ids=ascii)
def test_any_blanks_may_stand_around_a_line(folder, indexed, blank):
    path = write(folder / "m.jsonl", [blank + json.dumps(ROW) + blank, ROW])
    assert [sample.text for sample in TrainingSet(Samples([open_index(path)]))] == [ROW["text"]] * 2


def test_the_bytes_do_not_depend_on_processes_or_ranges(folder, indexed, monkeypatch):
    path = write(folder / "m.jsonl", MIXED * 4)
    found = []
    for processes, size in ((1, 600), (2, 600), (3, 100), (2, 1 << 20)):
        monkeypatch.setattr(scan_module, "RANGE", size)
        index_of(path).unlink(missing_ok=True)
        open_index(path, processes=processes)
        found.append(index_of(path).read_bytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["m.json", "m.csv", "m.jsonl.gz"])
def test_rows_of_other_forms_are_kept_in_the_index(folder, indexed, monkeypatch, name):
    import gzip

    rows = [{**ROW, "text": f"number {number}"} for number in range(50)] + [ROW | {"audio_filepath": "gone.wav"}]
    path = folder / name
    if name == "m.json":
        path.write_text(json.dumps(rows, indent=1))
    elif name == "m.csv":
        path.write_text("audio_filepath,text\n" + "".join(f"{row['audio_filepath']},{row['text']}\n" for row in rows))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    indexed(False)
    wanted = chosen(path, 1)
    indexed(True)
    assert chosen(path, 1) == wanted
    assert files_of(folder) == {"a.wav", "long.wav", "empty.wav", "noise.wav", "b", "b/c.wav", name, f".{name}.index"}
    monkeypatch.setattr(index_module, "_make", None)
    assert chosen(path, 1) == wanted
    os.utime(path, ns=(1, 1))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    assert chosen(path, 1) == wanted


def test_two_manifests_and_samples_in_memory(folder, indexed):
    paths = [write(folder / name, [ROW | {"text": name, "duration": 0.4}] * 3) for name in ("m.jsonl", "n.jsonl")]
    samples = select_samples(paths, [], stage=2).samples
    more = Sample(id="t.jsonl:1", audio=None, task="qa", prompt="?", answer="yes")
    together = samples[::-2] + [more]
    assert [sample.id for sample in together] == ["n.jsonl:3", "n.jsonl:1", "m.jsonl:2", "t.jsonl:1"]
    assert together.tasks() == ["transcribe"] * 3 + ["qa"] and together.has_text_only()
    assert [entry["manifest"] for entry in data_of(together)] == ["n.jsonl", "m.jsonl", "t.jsonl"]
    assert together[-1] is more and together[1:2][0].text == "n.jsonl" and len(together[4:]) == 0


def test_of_two_manifests_of_one_name_none_hides_what_the_other_lacks(folder, indexed, tmp_path):
    row = ROW | {"audio_filepath": "gone.wav"}
    paths = [write(place / "m.jsonl", [ROW, row]) for place in (folder, folder / "b")]
    shutil.copy(folder / "a.wav", folder / "b" / "a.wav")
    left_out = []
    select_samples(paths, left_out, stage=1)
    journal = Journal(tmp_path)
    for left in left_out:
        journal.leave_out(0, left)
    assert [left.file for left in left_out] == [str(path.parent / "gone.wav") for path in paths]
    assert len(journal.left_out) == 2


# --- refusals


@pytest.fixture
def outside(folder):
    """A recording outside the folder, and a link to it inside."""
    secret = folder.parent / "secret.wav"
    shutil.copy(folder / "a.wav", secret)
    (folder / "link.wav").symlink_to(secret)
    (folder / "away").symlink_to(folder.parent)
    return secret


BAD = {
    "not-json": "oops",
    "latin-1": None,
    "no-text": {"audio_filepath": "a.wav"},
    "string-as-duration": ROW | {"duration": -1},
    "outside": ROW | {"audio_filepath": "../secret.wav"},
    "link": ROW | {"audio_filepath": "link.wav"},
    "linked-folder": ROW | {"audio_filepath": "away/secret.wav"},
    "long-line": ROW | {"text": "a" * 3_000},
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("name", BAD)
def test_the_same_line_is_refused(folder, indexed, outside, monkeypatch, name):
    monkeypatch.setattr(source_module, "LONGEST_LINE", 2_000)
    monkeypatch.setattr(scan_module, "LONGEST_LINE", 2_000)
    path = write(folder / "m.jsonl", [*MIXED * 2, BAD[name] or "", *MIXED, "oops"])
    if name == "latin-1":
        lines = path.read_bytes().split(b"\n")
        lines[len(MIXED) * 2] = b'{"text": "sch\xf6n"}'
        path.write_bytes(b"\n".join(lines))
    told = []
    for way in (False, True):
        indexed(way)
        left_out = []
        with pytest.raises(ManifestError) as fault:
            select_samples([path], left_out, stage=2, note=len)
        told.append((str(fault.value), left_out))
        with pytest.raises(ManifestError) as read:
            read_manifest(path, leave_out=lambda *_: None, note=len)
        assert str(read.value) == str(fault.value)
    assert told[0] == told[1] and told[0][0].startswith(f"{path}:{len(MIXED) * 2 + 1}: ") and len(told[0][1]) == 4
    assert not list(folder.glob(".*"))


def test_an_array_that_is_damaged_behind_a_line_that_is_no_sample(folder, indexed):
    for rows, wanted in (([ROW, {"text": 1}], ":2: "), ([ROW, ROW], ":3: is not JSON")):
        (folder / "m.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + ",\n{]")
        with pytest.raises(ManifestError) as read:
            read_manifest(folder / "m.json")
        with pytest.raises(ManifestError) as fault:
            open_index(folder / "m.json")
        assert str(fault.value) == str(read.value) and wanted in str(fault.value)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("raw", [b"\n" * 50, b"\xef\xbb\xbf"], ids=["blank-lines", "byte-order-mark"])
def test_a_manifest_without_samples(folder, indexed, raw):
    (folder / "m.jsonl").write_bytes(raw)
    with pytest.raises(ManifestError, match="holds no samples"):
        open_index(folder / "m.jsonl")


def test_strict_raises_the_same(folder, indexed):
    path = write(folder / "m.jsonl", [ROW | {"audio_filepath": "long.wav"}, ROW, ROW | {"audio_filepath": "gone.wav"}])
    told = []
    for way in (False, True, True):
        indexed(way)
        with pytest.raises(SampleError) as fault:
            select_samples([path], [], stage=1, strict=True)
        told.append(str(fault.value))
    assert told == [f"m.jsonl:3: gone.wav: {told[0].partition('wav: ')[2]}"] * 3


def test_a_pipe_is_refused(folder):
    os.mkfifo(folder / "m.jsonl")
    with pytest.raises(ManifestError, match="pipe"):
        open_index(folder / "m.jsonl")


# --- stale, damaged, forged


def text_of(path: Path) -> list[str]:
    return [sample.text for sample in Samples([open_index(path)])]


@pytest.fixture
def manifest(folder, indexed):
    path = write(folder / "m.jsonl", [ROW | {"text": f"number {number}", "duration": 0.4} for number in range(30)])
    os.utime(path, ns=(10**18, 10**18))
    open_index(path)
    return path


def test_an_index_of_another_size_is_stale(manifest):
    with open(manifest, "a") as file:
        file.write(json.dumps(ROW | {"text": "one more"}) + "\n")
    os.utime(manifest, ns=(10**18, 10**18))
    assert text_of(manifest)[-1] == "one more"


def test_an_index_of_other_content_is_stale(manifest):
    manifest.write_text(manifest.read_text().replace("number", "figure"))
    assert text_of(manifest)[0] == "figure 0"


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_an_index_of_other_content_of_the_same_size_and_time_is_stale(folder, indexed, name):
    path = folder / name
    lines = [json.dumps(ROW)] if name == "m.jsonl" else ["audio_filepath,text", "a.wav,turn it on"]
    write(path, lines)
    text_of(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("turn it on", "turn it up"))
    os.utime(path, ns=times)
    assert text_of(path) == ["turn it up"]


def test_a_copy_with_another_time_is_not_read_again(manifest, monkeypatch):
    before = index_of(manifest).read_bytes()
    os.utime(manifest, ns=(2 * 10**18, 2 * 10**18))
    monkeypatch.setattr(index_module, "_make", None)
    assert text_of(manifest)[0] == "number 0"
    assert index_of(manifest).read_bytes() != before  # it has the new time
    monkeypatch.setattr(index_module, "_hash_of", None)
    assert text_of(manifest)[0] == "number 0"


def test_a_recording_that_was_missing_and_comes_is_found(folder, indexed):
    path = write(folder / "m.jsonl", [ROW, ROW | {"audio_filepath": "gone.wav"}, ROW | {"audio_filepath": "noise.wav"}])
    assert len(chosen(path, 1)["samples"]) == 1
    shutil.copy(folder / "a.wav", folder / "gone.wav")
    assert len(chosen(path, 1)["samples"]) == 2
    shutil.copy(folder / "a.wav", folder / "noise.wav")
    assert len(chosen(path, 1)["samples"]) == 3


def test_a_folder_of_clips_that_comes_later_is_found(folder, indexed):
    (folder / "m.tsv").write_text("path\tsentence\na.mp3\tturn it on\n")
    assert not len(select_samples([folder / "m.tsv"], [], stage=2).samples)
    (folder / "clips").mkdir()
    shutil.copy(folder / "a.wav", folder / "clips" / "a.mp3")
    assert len(select_samples([folder / "m.tsv"], [], stage=2).samples) == 1


def test_a_full_disk_leaves_nothing_of_an_index_that_gets_a_new_time(manifest, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    os.utime(manifest, ns=(2 * 10**18, 2 * 10**18))
    monkeypatch.setattr(os, "fsync", full)
    assert text_of(manifest)[0] == "number 0"
    assert not list(folder.glob("*.part"))


def test_an_index_of_a_folder_that_was_copied_is_stale(manifest, folder):
    shutil.copytree(folder, folder.parent / "copy")
    (folder.parent / "copy" / "a.wav").unlink()
    left_out = []
    assert not len(select_samples([folder.parent / "copy" / "m.jsonl"], left_out, stage=1).samples)
    assert len(left_out) == 30


def test_what_was_allowed_once_is_not_allowed_for_ever(folder, indexed, outside):
    path = write(folder / "m.jsonl", [ROW, ROW | {"audio_filepath": "link.wav"}])
    assert len(chosen(path, 1, allow_outside=True)["samples"]) == 2
    with pytest.raises(ManifestError, match="link out of"):
        open_index(path)


def test_an_index_of_another_version_is_stale(manifest, monkeypatch):
    before = index_of(manifest).read_bytes()
    monkeypatch.setattr(index_module, "_version", lambda: "9.9")
    open_index(manifest)
    assert index_of(manifest).read_bytes() != before


DAMAGE = {
    "cut-short": lambda raw: raw[:-7],
    "only-its-head": lambda raw: raw[:10],
    "empty": lambda raw: b"",
    "a-bit": lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:],
    "of-its-header": lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:],
    "zeros": lambda raw: b"\0" * len(raw),
    "not-begun": lambda raw: b"\0" * 20 + raw[20:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_made_again(manifest, kind):
    whole = index_of(manifest).read_bytes()
    index_of(manifest).write_bytes(DAMAGE[kind](whole))
    assert text_of(manifest)[3] == "number 3"
    assert index_of(manifest).read_bytes() == whole


@pytest.mark.parametrize("ending", ["", ".part"])
def test_links_and_pipes_in_its_place_are_not_followed(manifest, folder, ending):
    private = folder.parent / "private"
    private.write_text("mine")
    place = Path(f"{index_of(manifest)}{ending}")
    for make in (lambda: place.symlink_to(private), lambda: os.mkfifo(place)):
        index_of(manifest).unlink()
        make()
        assert text_of(manifest)[0] == "number 0"
        assert private.read_text() == "mine" and index_of(manifest).is_file() and not index_of(manifest).is_symlink()


def forge(path: Path, **changes):
    """Change the header of an index, with a checksum that fits."""
    import zlib

    raw = index_of(path).read_bytes()
    magic, _, at = index_module.PREFIX.unpack(raw[: index_module.PREFIX.size])
    rest = raw[index_module.PREFIX.size : at] + json.dumps(json.loads(raw[at:]) | changes).encode()
    index_of(path).write_bytes(index_module.PREFIX.pack(magic, zlib.crc32(rest), at) + rest)


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": [["1", "x", "\x1b[31mred"]]},
        {"missing": [["1", "a.wav", "\x1b]0;title\x07", []]]},
        {"missing": 7},
        {"faults": [[99, "1", "a.wav", "fault", []]]},
        {"tasks": []},
        {"columns": {}},
        {"columns": {"offset": [1 << 60, 30]}},
        {"stamp": "yesterday"},
    ],
    ids=str,
)
def test_a_forged_header_is_not_believed(manifest, changes):
    forge(manifest, **changes)
    notes, left_out = [], []
    assert len(select_samples([manifest], left_out, stage=1, note=notes.append).samples) == 30
    assert not left_out and not any("\x1b" in note for note in notes)


def test_a_forged_index_does_not_lead_out_of_the_folder(folder, indexed, outside):
    path = write(folder / "m.jsonl", [ROW | {"audio_filepath": "link.wav", "duration": 0.4}])
    open_index(path, allow_outside=True)
    forge(path, allow_outside=False)
    samples = select_samples([path], [], stage=1).samples  # believed, but asked again when it is read
    with pytest.raises(ManifestError, match="is a symbolic link out of the manifest's folder"):
        samples[0]


# --- disks


def test_where_it_cannot_be_beside_the_manifest_it_is_in_the_cache(folder, indexed, monkeypatch):
    path = write(folder / "m.jsonl", MIXED)
    index_of(path).mkdir()
    notes = []
    open_index(path, say=notes.append)
    assert (
        index_files(path)[1].is_file() and str(index_files(path)[1]) in notes[-1] and str(index_of(path)) in notes[-1]
    )
    monkeypatch.setattr(index_module, "_make", None)
    assert len(open_index(path, say=notes.append).columns["line"]) and len(notes) == 3


@pytest.fixture
def small_disk():
    """No file may be longer than 4 000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("rows", [100, 3_000], ids=["in-the-index", "in-the-rows"])
@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_a_full_disk_in_the_middle_of_an_index(folder, indexed, small_disk, name, rows, request):
    rows = [ROW | {"duration": 0.4, "text": "a" * (rows // 100)} for _ in range(100)]
    path, notes = folder / name, []
    with open(os.open(path, os.O_CREAT | os.O_RDWR), "wb") as file:
        raw = json.dumps(rows) if name == "m.json" else "".join(json.dumps(row) + "\n" for row in rows)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        file.write(raw.encode())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if name == "m.json":
        with pytest.raises(ManifestError, match="File too large.*XDG_CACHE_HOME"):
            open_index(path, say=notes.append)
    else:
        assert len(Samples([open_index(path, say=notes.append)])) == 100
        assert "is not kept" in notes[-1] and "File too large" in notes[-1]
    assert not list(folder.glob(".*")) and not list((folder.parent / "cache").rglob("*.*"))


# --- kills and processes


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def test_killed_twenty_times_it_ends_in_the_same_bytes(folder, indexed):
    path = write(folder / "m.jsonl", MIXED * 25)
    begun = time.monotonic()
    open_index(path)
    lasts = time.monotonic() - begun
    wanted = index_of(path).read_bytes()
    index_of(path).unlink()
    files = files_of(folder)
    rng, killed, workers = random.Random(0), 0, []
    while killed < 20:
        process = FORK.Process(target=open_index, args=(path,))
        process.start()
        time.sleep(rng.uniform(0, lasts))
        workers += children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert not index_of(path).exists() or index_of(path).read_bytes() == wanted
        index_of(path).unlink(missing_ok=True)
    open_index(path)
    assert index_of(path).read_bytes() == wanted and files_of(folder) == files | {index_of(path).name}
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("where", ["tobytes", "fsync", "replace"])
def test_killed_while_it_is_written(folder, indexed, where):
    path = write(folder / "m.jsonl", MIXED * 4)
    open_index(path)
    wanted = index_of(path).read_bytes()
    index_of(path).unlink()

    def die():
        end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if where == "tobytes":
            index_module._crc_of = end
        else:
            setattr(os, where, end)
        open_index(path)

    process = FORK.Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not index_of(path).exists()
    assert Path(f"{index_of(path)}.part").exists()
    open_index(path)
    assert index_of(path).read_bytes() == wanted and not list(folder.glob("*.part"))


def test_of_several_processes_one_makes_it(folder, indexed):
    path = write(folder / "m.jsonl", MIXED * 10)
    said = FORK.SimpleQueue()
    processes = [FORK.Process(target=open_index, args=(path,), kwargs={"say": said.put}) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = []
    while not said.empty():
        lines.append(said.get())
    assert [line.split()[0] for line in lines] == ["indexing", "indexed"]
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_process_that_is_ended_by_others_is_one_line(folder, indexed, monkeypatch):
    path = write(folder / "m.jsonl", MIXED * 4)
    monkeypatch.setattr(scan_module, "scan_range", end_this_process)
    with pytest.raises(ManifestError, match=r"m.jsonl: a process that read it was ended"):
        open_index(path)


def end_this_process(part):
    os.kill(os.getpid(), signal.SIGKILL)


# --- after the index was made


class Processor:
    """Stands in for the model's: only what a clip needs."""

    def features(self, audio):
        import torch

        return torch.zeros(80, len(audio) // 160)

    def ctc_ids(self, text):
        return [1]


def test_a_recording_that_vanishes_is_left_out_with_one_line(manifest, folder):
    samples = select_samples([manifest], [], stage=1).samples
    (folder / "a.wav").unlink()
    collator = CheckedCollator(Processor(), 1)
    batch = collator([TrainingSet(samples)[i] for i in (0, 7)])
    assert [str(left) for left in batch["left_out"]] == [
        f"m.jsonl:{line}: {folder / 'a.wav'}: does not exist; name an audio file" for line in (1, 8)
    ]


def test_a_link_that_leads_out_now_is_left_out_with_one_line(manifest, folder, outside):
    samples = select_samples([manifest], [], stage=1).samples
    (folder / "a.wav").unlink()
    (folder / "a.wav").symlink_to(outside)
    (left,) = CheckedCollator(Processor(), 1)([TrainingSet(samples)[4]])["left_out"]
    assert isinstance(left, LeftOut) and "a.wav" in left.reason and "is a symbolic link out of" in left.reason
    assert str(left).splitlines() == [str(left)]


def test_a_line_that_was_changed_is_left_out(manifest):
    samples = select_samples([manifest], [], stage=1).samples
    raw = manifest.read_bytes()
    with open(manifest, "r+b") as file:
        file.seek(raw.index(b"number 0"))
        file.write(b"figure")
    assert "is not what it was" in TrainingSet(samples)[0].reason and TrainingSet(samples)[1].text == "number 1"


def test_a_manifest_that_is_replaced_is_still_read(manifest, folder):
    samples = select_samples([manifest], [], stage=1).samples
    os.replace(write(folder / "new.jsonl", [ROW]), manifest)
    assert samples[29].text == "number 29"


def test_the_duration_of_a_recording_that_was_changed_is_its_own(folder, indexed):
    path = write(folder / "m.jsonl", [ROW] * 3)
    samples = select_samples([path], [], stage=1).samples
    assert samples[0].duration == 0.5
    soundfile.write(folder / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    assert samples[0].duration == 1.0
    (folder / "a.wav").write_bytes(b"no audio")
    assert samples[0].duration == 0.5  # the fault is told when it is read


def test_a_recording_that_is_too_long_now_is_left_out(folder, indexed):
    samples = select_samples([write(folder / "m.jsonl", [ROW])], [], stage=1).samples
    shutil.copy(folder / "long.wav", folder / "a.wav")
    left = TrainingSet(samples)[0]
    assert isinstance(left, LeftOut) and "a.wav: duration = 31, but at most 30 s can be trained on" in left.reason


def test_samples_reach_other_processes(manifest):
    samples = select_samples([manifest], [], stage=1).samples
    assert list(pickle.loads(pickle.dumps(samples))) == list(samples)
    with FORK.Pool(2) as pool:
        assert pool.map(samples.__getitem__, range(5)) == list(samples[:5])


def test_the_digest_tells_lines_and_folders_apart(manifest, folder):
    def digest(path):
        return _digest(select_samples([path], [], stage=1).samples)

    found = {digest(manifest), digest(manifest)}
    assert len(found) == 1 and found.pop().startswith("lines:")
    other = write(folder / "n.jsonl", [ROW | {"text": f"number {number}", "duration": 0.4} for number in range(30)])
    first = digest(manifest)
    write(manifest, [ROW | {"text": f"number {number}", "duration": 0.4} for number in range(31)][1:])
    assert len({first, digest(manifest), digest(other)}) == 3


# --- the sampler


def order_of(**options) -> str:
    rng = np.random.default_rng(5)
    lengths = [None if rng.random() < 0.2 else float(length) for length in np.round(rng.uniform(0.5, 30, 2_000), 1)]
    groups = [("asr", "qa", "sound")[group] for group in rng.choice(3, 2_000, p=[0.9, 0.07, 0.03])]
    sampler = BucketBatchSampler(lengths, groups, 8, seed=3, **options)
    digest = hashlib.sha256()
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        digest.update(json.dumps(list(sampler)).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        pytest.param({}, "9f5ef18409a89e85", id="once-each"),
        pytest.param({"temperature": paper_temperature}, "cc20e500ec244425", id="temperature"),
        pytest.param({"rank": 1, "ranks": 3}, "4218ce6752a9370c", id="processes"),
    ],
)
def test_the_order_of_samples_is_that_of_version_0_2(options, wanted):
    assert order_of(**options) == wanted


def test_lengths_may_be_an_array(folder):
    lengths = np.array([1.0, np.nan, 3.0, 2.0, np.nan] * 40)
    asked = [None if np.isnan(length) else length for length in lengths.tolist()]
    found, wanted = (list(BucketBatchSampler(given, ["a"] * 200, 4, seed=1)) for given in (lengths, asked))
    assert found == wanted and sorted(i for batch in found for i in batch) == list(range(200))
    assert all(a != b for a, b in pairwise(found))
