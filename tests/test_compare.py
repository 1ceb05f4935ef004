"""Comparison of two models by their answers, by the command and on the page, which Chromium shows if it is there."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from soundwave.data.manifest import write_manifest
from soundwave.evaluation.compare import compare_rows
from soundwave.evaluation.intervals import interval, p_value
from soundwave.evaluation.scores import word_errors
from soundwave.evaluation.words import rules_for
from soundwave.report.comparison import make_page

TEXTS = ["turn on the light", "stop now please", "two three four five", "the <b>red</b> & green one", "go"] * 4


def spoken(answers, references=TEXTS, **more):
    rules = rules_for(references, "en")
    return [
        {"sample": f"t:{i}", "task": "transcribe", "reference": reference, "answer": answer, "normaliser": rule.name}
        | word_errors(reference, answer, rule)._asdict()
        | more
        for i, (reference, answer, rule) in enumerate(zip(references, answers, rules, strict=True))
    ]


def asked(right, task="voice"):
    return [
        {"sample": f"t:{i}", "task": task, "reference": "male", "answer": "male" if yes else "<i>female", "right": yes}
        | {"normaliser": "soundwave answers 2"}
        for i, yes in enumerate(right)
    ]


BAD = [text.replace("the", "a").replace("three", "tree") for text in TEXTS]


def test_scores_and_differences_are_those_of_the_counts():
    one, other = spoken(BAD) + asked([True, False] * 6), spoken(TEXTS) + asked([True] * 12)
    found = compare_rows(one, other)
    wer, accuracy = found.scores
    errors, of = [row["errors"] for row in one if "of" in row], [row["of"] for row in one if "of" in row]
    assert (wer.task, wer.score, wer.samples, wer.lower) == ("transcribe", "WER", 20, True)
    assert wer.values == (sum(errors) / sum(of), 0.0) and wer.difference == -wer.values[0]
    assert wer.interval == interval([-error for error in errors], of, TEXTS)
    assert wer.p == p_value([-error for error in errors], TEXTS)
    assert wer.better == (0, sum(error > 0 for error in errors))
    assert (accuracy.score, accuracy.values, accuracy.difference) == ("accuracy", (0.5, 1.0), 0.5)
    assert accuracy.better == (0, 6) and accuracy.interval[0] > 0 and accuracy.p < 0.05
    back = compare_rows(other, one)
    assert back.scores[0].difference == -wer.difference and back.scores[0].p == wer.p
    assert back.gains == [-gain for gain in found.gains]


def test_two_equal_models_do_not_differ():
    (score,) = compare_rows(spoken(BAD), spoken(BAD)).scores
    assert (score.difference, score.interval, score.p) == (0, [0, 0], 1)


def test_translations_are_compared_by_bleu():
    def rows(answers):
        return [
            {"sample": str(i), "task": "translate", "reference": text, "answer": answer, "target_lang": "de"}
            for i, (text, answer) in enumerate(zip(TEXTS, answers, strict=True))
        ]

    (score,) = compare_rows(rows(BAD), rows(TEXTS)).scores
    assert score.score == "BLEU" and score.values[1] == pytest.approx(100) and not score.lower
    assert score.p < 0.001 and score.interval[0] > 0
    (same,) = compare_rows(rows(BAD), rows(BAD)).scores
    assert (same.difference, same.p) == (0, 1)


def test_answers_of_earlier_versions_are_counted_now():
    keys = ("sample", "task", "reference", "answer")
    old = [[{key: row[key] for key in keys} for row in rows] for rows in (spoken(BAD), spoken(TEXTS))]
    (score,) = compare_rows(*old).scores
    assert score.values[1] == 0 < score.values[0]
    voices = [[{key: row[key] for key in keys} for row in asked(right)] for right in ([True, False], [True, True])]
    assert compare_rows(*voices).scores[0].values == (0.5, 1.0)


def test_what_only_one_has_answered_is_counted_and_left_out():
    found = compare_rows(spoken(BAD)[1:], spoken(TEXTS)[:-2])
    assert found.alone == (2, 1) and found.scores[0].samples == 17


def test_what_cannot_be_compared_is_refused():
    rows = spoken(TEXTS)
    with pytest.raises(ValueError, match="the two have answered no sample in common"):
        compare_rows(rows, [row | {"sample": f"u{row['sample']}"} for row in rows])
    with pytest.raises(ValueError, match="t:0: the two have other references"):
        compare_rows(rows, [row | {"reference": "x"} for row in rows])
    with pytest.raises(ValueError, match="t:0: was normalised with 'whisper.*' and with 'none .*; evaluate both with"):
        compare_rows(rows, [row | {"normaliser": "none (words between white space)"} for row in rows])
    with pytest.raises(ValueError, match="the second file has several answers to t:0"):
        compare_rows(rows, rows + [rows[0] | {"answer": "else"}])


# ---------------------------------------------------------------- the page and the command


def test_texts_of_files_stand_on_the_page_escaped():
    one, other = spoken(BAD) + asked([False, True]), spoken(TEXTS) + asked([True, True])
    page = make_page(compare_rows(one, other), ("<small>", "big & better"))
    assert "<small>" not in page and "&lt;small&gt;" in page and "big &amp; better" in page
    assert "<b>" not in page and "<i>female" not in page and "✗ &lt;i&gt;female" in page
    assert "Where big &amp; better is better" in page and "Where &lt;small&gt;" not in page
    assert "p &lt; 0.001" in page or "p = " in page


@pytest.fixture
def files(tmp_path):
    for name, rows in (("small", spoken(BAD) + asked([True, False] * 6)), ("big", spoken(TEXTS) + asked([True] * 12))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_prints_the_differences_and_writes_the_page(files, soundwave):
    words = files / "small.jsonl", files / "big.jsonl", "--out", files / "page.html"
    status, out, err = soundwave("compare", *words)
    assert status == 0 and not err
    assert "A small · B big" in out and "+50.0" in out and f"page {files / 'page.html'}" in out
    status, out, _ = soundwave("compare", *words, "--json")
    found = json.loads(out)
    assert status == 0 and found["names"] == ["small", "big"]
    assert [score["score"] for score in found["scores"]] == ["WER", "accuracy"]


def test_a_reading_by_ctc_and_answers_of_the_language_model_are_told_apart(files, soundwave, tmp_path):
    reading = [json.loads(line) | {"blanks": 3} for line in (files / "big.jsonl").read_text().splitlines()]
    ctc, page = tmp_path / "ctc.jsonl", tmp_path / "page.html"
    ctc.write_text("".join(json.dumps(row) + "\n" for row in reading))
    status, _, err = soundwave("compare", files / "small.jsonl", ctc, "--out", page)
    told = "Transcripts of ctc are what CTC writes, those of small what the language model answers."
    assert status == 0 and told in err and told in page.read_text()


def test_mistakes_are_one_line(files, soundwave, tmp_path):
    small, big = files / "small.jsonl", files / "big.jsonl"
    (files / "m").mkdir()
    (files / "m" / "config.json").write_text("{}")
    for words, fault in (
        ((small, small), "small.jsonl is given twice; name two"),
        ((small, files / "none"), "none: does not exist; give answers of `soundwave evaluate`, or a model"),
        ((small, files / "m"), "m: is a model; name with --test what both are evaluated on"),
        ((small, big, "--test", "meld"), "--test is for models, but A and B are answers; leave it out"),
    ):
        status, out, err = soundwave("compare", *words, "--out", files / "page.html")
        assert status == 1 and not out and len(err.splitlines()) == 1 and fault in err, err
    assert not (files / "page.html").exists()


def test_the_page_in_a_browser(files, soundwave):
    driver = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    soundwave("compare", files / "small.jsonl", files / "big.jsonl", "--out", files / "page.html")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        for scheme, width in (("light", 1200), ("dark", 420)):
            size = {"width": width, "height": 900}
            tab = browser.new_context(color_scheme=scheme, viewport=size, offline=True).new_page()
            said: list[str] = []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.goto((files / "page.html").as_uri())
            assert tab.inner_text("h1") == "small and big" and said == []
            assert tab.locator("svg circle").count() == 4 and tab.locator(".word.error").count() > 0
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            colours = [
                tab.evaluate(f"getComputedStyle(document.querySelector('.name-{which}')).color")
                for which in ("first", "second")
            ]
            assert colours[0] != colours[1]  # the style is not blocked
        browser.close()


def test_two_models_are_evaluated_and_compared(models_of_few_tokens, soundwave, tmp_path):
    rows = []
    for i in range(3):
        samples = np.random.default_rng(i).standard_normal(9000 + 900 * i)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * samples, 16_000)
        rows.append({"audio_filepath": f"{i}.wav", "text": "stop"})
    write_manifest(tmp_path / "test.jsonl", rows)
    models = [models_of_few_tokens[stage] for stage in (1, 3)]
    words = *models, "--test", tmp_path / "test.jsonl", "--out", tmp_path / "page.html", "--max-new-tokens", 4
    status, out, err = soundwave("compare", *words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["names"] == ["stage1/model", "stage3/model"] and found["scores"][0]["samples"] == 3
    assert (tmp_path / "page-a" / "scores.json").is_file() and (tmp_path / "page-b" / "answers.jsonl").is_file()
    assert "Test: test.jsonl." in (tmp_path / "page.html").read_text()
