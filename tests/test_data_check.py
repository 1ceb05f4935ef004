"""`soundwave data check`: every fault of a manifest is found and named, with a page to look at and to listen to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave.curation import check as checking
from soundwave.curation import sounds
from soundwave.curation.check import FAULTS, REMARKS, Checked, check_manifest
from soundwave.curation.sounds import Part, Sound, measure, measure_all
from soundwave.data.audio import AudioError
from soundwave.data.collate import CheckedCollator
from soundwave.data.manifest import ManifestError, read_manifest, write_manifest
from soundwave.report.checked import write_page

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def save(path: Path, samples: np.ndarray, rate: int = RATE, **options) -> str:
    soundfile.write(path, samples, rate, **options)
    return path.name


def broken(folder: Path) -> Path:
    """A manifest with one line of each fault and remark, behind four good ones."""
    with_nan = noise(1, 5)
    with_nan[100] = np.nan
    rows = [
        {"audio_filepath": save(folder / "0.wav", noise(1, 0)), "text": "turn on the light", "duration": 1.0},
        {"audio_filepath": save(folder / "1.flac", noise(4, 1), subtype="PCM_16"), "text": "and off again"},
        {"audio_filepath": "0.wav", "task": "who", "prompt": "Who?", "answer": "a man"},
        {"task": "qa", "prompt": "2 + 2?", "answer": "4"},
        {"audio_filepath": "none.wav", "text": "missing"},
        {"audio_filepath": save(folder / "nan.wav", with_nan, subtype="FLOAT"), "text": "not a number"},
        {"audio_filepath": save(folder / "zero.wav", noise(0)), "text": "no samples"},
        {"audio_filepath": save(folder / "cut.wav", noise(1, 6)), "text": "cut short"},
        {"audio_filepath": save(folder / "zip.wav", noise(1, 7)), "text": "an archive"},
        {"audio_filepath": "1.flac", "duration": 5.0, "text": "and off again"},
        {"audio_filepath": save(folder / "silent.wav", np.zeros(RATE)), "text": "nothing"},
        {"audio_filepath": save(folder / "long.flac", noise(31, 2), subtype="PCM_16"), "text": "long"},
        {
            "audio_filepath": save(folder / "short.wav", noise(0.1, 3)),
            "text": "many words in a short time, are there not",
        },
        {"audio_filepath": save(folder / "copy.wav", noise(1, 0)), "text": "Turn off the light."},
        {"audio_filepath": save(folder / "same.wav", noise(1, 0)), "text": "turn on the light"},
        {"audio_filepath": "1.flac", "duration": 1.0, "text": "and"},
    ]
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:1000])
    (folder / "zip.wav").write_bytes(b"PK\3\4" + bytes(1000))
    write_manifest(folder / "m.jsonl", rows)
    with open(folder / "m.jsonl", "ab") as file:
        file.write(b'{"text": \n{"audio_filepath": "0.wav", "text": "<script>alert(1)</script>", "task": 7}\n')
    return folder / "m.jsonl"


# place -> kind, and what the line must say
FOUND = {
    5: ("audio", 'audio_filepath "none.wav" does not exist'),
    6: ("audio", "nan.wav: holds NaN or infinite samples"),
    7: ("audio", "zero.wav: holds no samples"),
    8: ("audio", "cut.wav: is cut short"),
    9: ("audio", "zip.wav: cannot be decoded"),
    10: ("audio", "1.flac: offset + duration = 5 s, but the file lasts 4 s"),
    11: ("silent", "is silent, but its text is 'nothing'"),
    12: ("long", "lasts 31 s, but at most 30 s can be trained on"),
    13: ("labels", "has 3 frames, but its text"),
    14: ("texts", "has the text 'Turn off the light.', but the same sound has 'turn on the light' in m.jsonl:1"),
    15: ("twice", "is the same sound, task and text as m.jsonl:1"),
    16: ("part", "takes 1 s from the beginning, but the file lasts 4 s"),
    17: ("line", "is not JSON"),
    18: ("line", "which task 7 needs"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return broken(tmp_path_factory.mktemp("broken")).parent


@pytest.fixture(scope="module")
def checked(folder, processor) -> Checked:
    return check_manifest(folder / "m.jsonl", processor=processor, tokenizer_name="the default", processes=1)


# --- what is found


def test_the_lines_have_all_kinds(checked):
    assert {kind for kind, _ in FOUND.values()} == (FAULTS | REMARKS).keys() - {"unknown"}


@pytest.mark.parametrize("line", range(1, 19))
def test_each_line_gives_what_is_wrong_with_it(checked, line):
    found = [(one.kind, one.text) for one in checked.findings if one.place == f"m.jsonl:{line}"]
    if line not in FOUND:
        assert found == []
        return
    kind, text = FOUND[line]
    assert [one for one, _ in found] == [kind]
    assert text in found[0][1] and found[0][1].isprintable()


def test_figures(checked):
    assert (checked.lines, checked.samples) == (18, 15)
    who, total = checked.tasks["who"], checked.total
    assert (who.samples, who.recordings, who.seconds) == (1, 1, 1.0)
    assert (total.samples, total.recordings) == (15, 9)
    assert total.seconds == pytest.approx(1 + 4 + 1 + 1 + 31 + 0.1 + 1 + 1 + 1)
    assert dict(zip(checking.EDGES, checked.lengths, strict=True))[1] == 6
    assert (checked.lengths[0], checked.lengths[-1], checked.rates) == (1, 1, {RATE: 9})
    assert checked.texts == 7


def test_faults_are_those_that_training_leaves_out_or_stops_at(folder, checked, processor):
    """With the words of the collator, which meets them one by one."""
    left, rows = {}, (folder / "m.jsonl").read_text().splitlines()[:16]
    (folder / "whole.jsonl").write_text("\n".join(rows))
    samples = read_manifest(folder / "whole.jsonl", leave_out=lambda name, file, reason: left.update({name: reason}))
    collator = CheckedCollator(processor, 2)
    for sample in samples:
        try:
            collator.clip(sample)
        except AudioError as error:
            left[sample.id] = error.fault
    wanted = {f"whole.jsonl:{line}" for line, (kind, _) in FOUND.items() if kind in ("audio", "silent", "labels")}
    assert left.keys() == wanted
    for name, reason in left.items():
        (found,) = [one for one in checked.findings if one.place == name.replace("whole", "m")]
        assert reason in found.text


@pytest.mark.parametrize("samples", [1, 159, 160, 1599, 1600, 1601, 16_000, 16_639, 16_640])
@pytest.mark.parametrize("frame_stack", [1, 2, 3])
def test_number_of_frames_is_that_of_the_features(processor, samples, frame_stack):
    mel = processor.features(np.zeros(samples, np.float32)).shape[1]
    check = checking._Check(Path("m"), processor, "", frame_stack, 0)
    assert check._frames(samples) == -(-mel // (2 * frame_stack))


def test_texts_that_the_tokenizer_does_not_give_back(tmp_path):
    from soundwave import backbones
    from soundwave.model.processing import SoundwaveProcessor

    processor = SoundwaveProcessor.from_backbones(backbones.WHISPER, backbones.LANGUAGE_MODEL)
    processor.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    save(tmp_path / "a.wav", noise(2))
    write_manifest(
        tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": text} for text in ("turn it on", "Turn It On")]
    )
    found = check_manifest(tmp_path / "m.jsonl", processor=processor, tokenizer_name="small", processes=1)
    (remark,) = [one for one in found.findings if one.kind == "unknown"]
    assert remark.place == "m.jsonl:2"
    assert "its text 'Turn It On' comes back as 'turn it on': the tokenizer writes other characters" in remark.text
    coverage = found.coverage
    assert (coverage.texts, coverage.characters, coverage.name) == (2, 20, "small")
    assert coverage.used == set(processor.ctc_ids("turn it on")) and coverage.tokens == 2 * len(coverage.used)


def test_without_a_tokenizer_everything_else_is_checked(folder):
    found = check_manifest(folder / "m.jsonl", processes=1, listen_to=0)
    assert found.coverage is None and found.count("labels") == 0 and found.spread == []
    assert len(found.findings) == len(FOUND) - 1


def test_a_source_that_ends_in_the_middle_is_a_fault_of_its_own(tmp_path):
    save(tmp_path / "a.wav", noise(1))
    (tmp_path / "m.json").write_text('[{"audio_filepath": "a.wav", "text": "one"},\n{"audio_filepath": "a.wav"')
    found = check_manifest(tmp_path / "m.json", processes=1)
    assert (found.lines, found.samples) == (1, 1)
    (finding,) = found.findings
    assert (finding.kind, finding.place) == ("line", "m.json") and "m.json:2: is not JSON" in finding.text


def test_a_manifest_without_lines_is_an_error(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="holds no samples"):
        check_manifest(tmp_path / "m.jsonl", processes=1)


@pytest.mark.parametrize(("good", "wanted"), [(3, 3), (4, 4), (23, 4), (100, 4)])
def test_samples_to_listen_to_are_from_all_over_the_manifest(good, wanted):
    check = checking._Check(Path("m"), None, "", 2, 4)
    for number in range(good):
        check._keep(number)
    spread = check.finished().spread
    assert len(spread) == wanted and spread[0] == 0
    assert max(b - a for a, b in zip(spread, [*spread[1:], good], strict=True)) <= 2 * good / wanted


# --- decoding


def test_a_recording_of_many_lines_is_decoded_once(tmp_path, monkeypatch):
    decoded = []

    def counted(parts, processes):
        for part in parts:
            decoded.append(part)
            yield measure(part)

    monkeypatch.setattr(checking, "measure_all", counted)
    for name in ("a.wav", "b.wav"):
        save(tmp_path / name, noise(1, len(decoded)))
    rows = [
        {"audio_filepath": name, "task": str(i), "prompt": "?", "answer": "x"}
        for i in range(5)
        for name in ("a.wav", "b.wav")
    ]
    write_manifest(tmp_path / "m.jsonl", rows)
    assert check_manifest(tmp_path / "m.jsonl").total.recordings == 10
    assert len(decoded) == 2


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_the_same_sound_has_the_same_digest_in_another_file(tmp_path, name):
    samples = np.rint(noise(1) * 32767).astype(np.int16)
    save(tmp_path / "first.wav", samples)
    save(tmp_path / name, samples)
    one, other = (measure(Part(str(tmp_path / file), 0.0, None)) for file in ("first.wav", name))
    assert one.digest == other.digest
    assert one._replace(digest=0) == Sound(RATE, RATE, 1.0, one.peak)
    save(tmp_path / name, noise(1, 1))
    assert measure(Part(str(tmp_path / name), 0.0, None)).digest != one.digest


def kill(part: Part) -> Sound:
    if "kill" in part.audio:
        os._exit(9)
    return Sound(samples=int(part.offset) + 1)


def kill_each(parts: list[Part]) -> list[Sound]:
    return [kill(part) for part in parts]


def test_a_recording_that_ends_its_process_is_found_by_itself(monkeypatch):
    context = __import__("multiprocessing").get_context("fork")
    monkeypatch.setattr(sounds, "_pool", lambda processes: sounds.ProcessPoolExecutor(processes, mp_context=context))
    monkeypatch.setattr(sounds, "measure", kill)
    monkeypatch.setattr(sounds, "_measure_each", kill_each)
    monkeypatch.setattr(sounds, "CLIPS_AT_ONCE", 3)
    parts = [Part("kill" if number == 7 else "a", number, None) for number in range(20)]
    found = list(measure_all(iter(parts), 2))
    assert [sound.samples for sound in found] == [0 if number == 7 else number + 1 for number in range(20)]
    assert "ends the process that decodes it" in found[7].fault


def test_a_script_that_guards_nothing_is_told_so_and_no_recording_is_blamed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from soundwave.curation.sounds import Part, measure_all\n"
        "print(list(measure_all([Part('a.wav', 0.0, None)], 2)))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert ended.returncode and not ended.stdout
    assert "in a script, call this below" in ended.stderr.splitlines()[-1]


def test_processes_find_the_same(folder, checked, processor):
    found = check_manifest(folder / "m.jsonl", processor=processor, tokenizer_name="the default", processes=2)
    assert found == checked


# --- the command and its page


def test_the_command_prints_every_bad_line_and_fails(soundwave, folder, tmp_path):
    page = tmp_path / "new" / "page.html"
    status, out, _ = soundwave("data", "check", folder / "m.jsonl", "--processes", "1", "--html", page)
    assert status == 1
    for line, (_, text) in FOUND.items():
        assert f"  m.jsonl:{line}: " in out and text in out
    assert out.rstrip().endswith("12 faults · 2 remarks") and f"page {page}" in out
    assert "18 lines · 15 samples · 9 recordings" in out and "16000 Hz 9" in out
    assert page.is_file()


def test_the_command_succeeds_where_nothing_is_wrong(soundwave, tmp_path):
    save(tmp_path / "a.wav", noise(1))
    write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": "one"}])
    status, out, _ = soundwave("data", "check", tmp_path / "m.jsonl", "--processes", "1")
    assert (status, out.rstrip().splitlines()[-1]) == (0, "0 faults · 0 remarks")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["none.jsonl"], "none.jsonl: does not exist"),
        (["m.jsonl", "--html", "m.jsonl"], "--html m.jsonl is the manifest itself; name another file"),
        (["m.jsonl", "--model", "x", "--tokenizer", "y"], "--model brings its own tokenizer; leave out --tokenizer"),
        (["m.jsonl", "--model", "x"], "x holds no model"),
    ],
)
def test_a_wrong_option_is_one_line(soundwave, folder, monkeypatch, words, wanted):
    monkeypatch.chdir(folder)
    status, out, err = soundwave("data", "check", *words)
    assert (status, out) == (1, "") and wanted in err and len(err.splitlines()) == 1


def test_words_of_a_manifest_stay_text_on_the_page(tmp_path, processor):
    text = '</script><img src=x onerror="alert(1)">'
    save(tmp_path / "a.wav", noise(4))
    write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": text}])
    found = check_manifest(tmp_path / "m.jsonl", processor=processor, tokenizer_name=text, processes=1)
    page = write_page(found, tmp_path / "page.html").read_text()
    assert "<img" not in page and json.dumps(text)[1:8].replace("<", "\\u003c") in page


def test_the_page_in_a_browser(folder, checked, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    page, said = write_page(checked, tmp_path / "page.html"), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        tab = browser.new_context(viewport={"width": 400, "height": 900}, offline=True).new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        tab.goto(page.as_uri())
        words = tab.inner_text("body")
        for line, (_, text) in FOUND.items():
            assert f"m.jsonl:{line}" in words and text in words
        assert "12\nfaults" in words and "embedded" not in words
        players = tab.locator(".clip audio")
        # Silent, long, labels, texts, twice, part, and the three good ones with sound.
        assert players.count() == 9
        seconds = tab.evaluate(
            """Promise.all([...document.querySelectorAll(".clip audio")].map((audio) => new Promise((done) => {
              if (audio.readyState) done(audio.duration); else audio.onloadedmetadata = () => done(audio.duration);
              audio.onerror = () => done(null);
            })))"""
        )
        assert sorted(seconds) == pytest.approx([0.1, 1, 1, 1, 1, 1, 1, 4, 30], abs=0.1)
        assert tab.evaluate("document.documentElement.scrollWidth") == 400
        browser.close()
    assert said == []
