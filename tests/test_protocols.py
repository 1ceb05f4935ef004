"""Named tests over small copies of their corpora, AIR-Bench by both rules and with a judge, classes, translations."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import soundfile

from soundwave.evaluation import airbench, classes, translation
from soundwave.evaluation.airbench import Judge, benchmark_option, judge_chat, score_chat, score_foundation
from soundwave.evaluation.classes import classes_of, confusion_of, labels_of, macro_f1, named_label
from soundwave.evaluation.corpora import EMOTIONS, VOCAL_SOUNDS
from soundwave.evaluation.protocols import protocol_named
from soundwave.evaluation.summary import score_rows
from soundwave.evaluation.words import NORMALISERS, rules_for, words_of

# ---------------------------------------------------------------- corpora


def record(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.zeros(1600), 16_000)


def read(name: str, folder: Path, prompt: str | None = None, leave_out=None):
    return protocol_named(name).read(folder, prompt, leave_out)


@pytest.mark.parametrize("root", ["", "LibriSpeech", "LibriSpeech/test-clean"])
def test_librispeech(tmp_path, root):
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "1089" / "134686"
    for number in ("0000", "0001"):
        record(chapter / f"1089-134686-{number}.flac")
    (chapter / "1089-134686.trans.txt").write_text("1089-134686-0000 HE HOPED\n1089-134686-0001 STUFF IT\n")
    samples = read("librispeech-test-clean", tmp_path / root)
    assert [(s.audio.name, s.text, s.task, s.source_lang) for s in samples] == [
        ("1089-134686-0000.flac", "HE HOPED", "transcribe", "en"),
        ("1089-134686-0001.flac", "STUFF IT", "transcribe", "en"),
    ]
    assert read("librispeech-test-clean", tmp_path / root, "Write.")[0].prompt == "Write."
    (chapter / "1089-134686-0000.flac").unlink()
    left: list[tuple[str, str, str]] = []
    kept = read("librispeech-test-clean", tmp_path / root, None, lambda *fault: left.append(fault))
    assert [sample.text for sample in kept] == ["STUFF IT"]
    ((name, _, fault),) = left
    assert name.endswith(":1089/134686/1089-134686.trans.txt, line 1") and fault.startswith("does not exist")
    with pytest.raises(FileNotFoundError, match="holds no test-other or LibriSpeech/test-other; give --data"):
        read("librispeech-test-other", tmp_path)


@pytest.mark.parametrize("split", [True, False], ids=["with a column split", "one table a split"])
def test_covost(tmp_path, split):
    (tmp_path / "en" / "clips").mkdir(parents=True)
    header, end = ("path\ttranslation\tsplit\n", "\ttest\n") if split else ("path\tsentence\ttranslation\n", "\n")
    middle = "\t" if split else '\tA "word.\t'
    table = tmp_path / "en" / f"covost_v2.en_de{'' if split else '.test'}.tsv"
    rows = [f'common_{i}.mp3{middle}"Wort" {i}.{end}' for i in range(2)]
    table.write_text(header + "".join(rows) + ("common_9.mp3\tnein\ttrain\n" if split else ""))  # fmt: skip
    samples = read("covost2-en-de", tmp_path)
    assert [(s.audio.name, s.answer, s.target_lang) for s in samples] == [
        ("common_0.mp3", '"Wort" 0.', "de"),
        ("common_1.mp3", '"Wort" 1.', "de"),
    ]
    assert samples[0].prompt == "Translate the speech into German." and samples[0].task == "translate"
    # pandas writes the corpus's tables with a backslash before a quote and before a backslash
    table.write_text(header + f'common_0.mp3{middle}Er sagte: \\"C:\\\\\\".{end}')
    assert read("covost2-en-de", tmp_path)[0].answer == 'Er sagte: "C:\\".'
    table.write_text(header + f"../../secret{middle}x{end}")
    with pytest.raises(ValueError, match=r"covost_v2.*tsv:2: ../../secret.mp3 leads out of .*clips; correct the table"):
        read("covost2-en-de", tmp_path)
    table.write_text("path\n")
    with pytest.raises(ValueError, match="has no column translation; give the corpus's own table"):
        read("covost2-en-de", tmp_path)
    table.write_text(header)
    with pytest.raises(ValueError, match="lists no recording of the test set"):
        read("covost2-en-de", tmp_path)


def test_meld(tmp_path):
    record(tmp_path / "output_repeated_splits_test" / "dia0_utt1.wav")
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"
    table = tmp_path / "test_sent_emo.csv"
    table.write_bytes(header.encode() + b'1,"Why,\x92 not",Joey,Surprise,positive,0,0\n2,No,Joey,anger,negative,0,1\n')
    samples = read("meld", tmp_path)
    assert [(s.id, s.audio.name, s.answer) for s in samples] == [
        ("dia0_utt0", "dia0_utt0.mp4", "surprise"),
        ("dia0_utt1", "dia0_utt1.wav", "anger"),
    ]
    assert samples[0].extra["labels"] == list(EMOTIONS) and all(emotion in samples[0].prompt for emotion in EMOTIONS)
    table.write_text(header + "1,No,Joey,rage,negative,0,0\n")
    with pytest.raises(ValueError, match="csv:2: Emotion = 'rage', but MELD has anger, disgust"):
        read("meld", tmp_path)


@pytest.mark.parametrize("table", ["datafiles/te.json", "meta/te_meta.csv"])
def test_vocalsound(tmp_path, table):
    for name in ("f0001_0_cough", "f0001_0_throatclearing", "m0002_0_sigh"):
        record(tmp_path / "audio_16k" / f"{name}.wav")
    file = tmp_path / table
    file.parent.mkdir()
    names = ("f0001_0_cough", "f0001_0_throatclearing")
    entries = [{"wav": f"/home/somebody/{name}.wav", "labels": "/m/01b_21"} for name in names]
    file.write_text(json.dumps({"data": entries}) if file.suffix == ".json" else "f0001,33,female\n")
    samples = read("vocalsound", tmp_path)
    if file.suffix == ".csv":  # a table of speakers names no recordings: each take has all sounds
        assert [sample.answer for sample in samples] == list(VOCAL_SOUNDS.values())
        samples = [sample for sample in samples if sample.audio.is_file()]
        file.write_text("f0009,33,female\n")
        assert [sample.id for sample in read("vocalsound", tmp_path)] == [f"f0009_0_{sound}" for sound in VOCAL_SOUNDS]
    assert [(s.audio.name, s.answer) for s in samples] == [
        ("f0001_0_cough.wav", "cough"),
        ("f0001_0_throatclearing.wav", "throat clearing"),
    ]
    assert samples[0].extra["labels"] == list(VOCAL_SOUNDS.values())
    if file.suffix == ".json":
        for text in ("", "[]", '{"data": [{"wav": 1}]}'):
            file.write_text(text)
            with pytest.raises(ValueError, match="te.json: is no list of VocalSound"):
                read("vocalsound", tmp_path)


@pytest.mark.parametrize("name", ["librispeech", "covost2-en", "covost2-EN-de", "MELD", "../meld", "airbench"])
def test_other_names_are_no_tests(name):
    assert protocol_named(name) is None


# ---------------------------------------------------------------- AIR-Bench


@pytest.fixture
def foundation(tmp_path) -> Path:
    entries = [
        {"path": f"{i}.wav", "question": "How does he feel?", "choice_a": "angry", "choice_b": "happy",
         "choice_c": "sad", "choice_d": None, "answer_gt": "happy", "task_name": "Emotion", "dataset_name": "x",
         "uniq_id": 0}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "Foundation_meta.json").write_text(json.dumps(entries))
    return tmp_path


def test_foundation_questions_are_asked_as_the_benchmark_asks_them(foundation):
    record(foundation / "Emotion_x" / "1.flac")
    samples = read("airbench-foundation", foundation)
    assert [s.id for s in samples] == [f"Foundation_meta.json:{i}" for i in range(1, 7)]
    assert [s.audio.name for s in samples[:2]] == ["0.wav", "1.flac"]
    assert samples[0].prompt.splitlines() == [
        airbench.INSTRUCTION, "How does he feel?", "A. angry", "B. happy", "C. sad"
    ]  # fmt: skip
    assert samples[0].answer == "B" and samples[0].task == "Emotion_x"
    for change, message in (
        ({"answer_gt": "bored"}, "Foundation_meta.json:1: answer_gt = 'bored' is none of its options"),
        ({"path": "../../../x.wav"}, "Foundation_meta.json:1: .*x.wav leads out of"),
        ({"question": None}, "Foundation_meta.json:1: lacks question"),
    ):
        entries = json.loads((foundation / "Foundation_meta.json").read_text())
        entries[0] |= change
        other = foundation / "other"
        other.mkdir(exist_ok=True)
        (other / "Foundation_meta.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=message):
            read("airbench-foundation", other)


def test_both_rules_of_the_foundation_part_by_hand(foundation):
    samples = read("airbench-foundation", foundation)
    #            strict  benchmark
    answers = {
        "B": (True, True),
        "Both are wrong": (False, True),  # the benchmark reads its first letter
        "The answer is (B)": (True, True),  # the last but one
        "happy": (True, None),
        "I cannot tell": (False, None),
        "A.": (False, False),
    }
    rows = [
        {"sample": sample.id, "task": sample.task, "reference": "B", "answer": text}
        for sample, text in zip(samples, answers, strict=True)
    ]
    found = score_foundation(rows, samples)["Emotion_x"]
    strict = sum(right for right, _ in answers.values())
    counted = [right for _, right in answers.values() if right is not None]
    assert (found.questions, found.strict) == (6, strict / 6)
    assert (found.benchmark, found.dropped) == (sum(counted) / len(counted), 2)
    assert found.unparsed == 2
    assert score_foundation(rows, samples)["average"].strict == found.strict
    silent = [row | {"answer": ""} for row in rows]
    assert score_foundation(silent, samples)["Emotion_x"] == (6, 0.0, None, 6, 6)


@pytest.mark.parametrize(
    ("answer", "option"),
    [("A", "A"), ("Dogs", "D"), ("it is B.", "B"), ("(C)", "C"), ("b", None), ("", None), ("None", None), ("x", None),
     ("\nB\n", "B")],
)  # fmt: skip
def test_the_benchmarks_own_rule(answer, option):
    assert benchmark_option(answer) == option


class Server(BaseHTTPRequestHandler):
    """A judge that prefers the first place: it gives what `said` has, or 9 and 4."""

    asked: list = []
    said = "9 4"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        answer = json.dumps({"choices": [{"message": {"content": type(self).said}}]}).encode()
        self.send_response(200 if body["model"] == "judge" else 404)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.asked, Server.said = [], "9 4"
    with HTTPServer(("127.0.0.1", 0), Server) as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}/v1"
        one.shutdown()
        thread.join()


def test_a_judge_rates_chat_in_both_orders_and_is_not_asked_again(server, tmp_path):
    entries = [{"path": "0.wav", "question": "Who {first} speaks?", "answer_gt": "a man", "task_name": "speech_QA",
                "dataset_name": "x", "meta_info": "a man says hello"}]  # fmt: skip
    (tmp_path / "Chat_meta.json").write_text(json.dumps(entries))
    samples = read("airbench-chat", tmp_path)
    rows = [{"sample": samples[0].id, "task": "speech_QA", "reference": "a man", "answer": "a {question} woman"}]
    kept = []
    ratings = judge_chat(rows, samples, Judge(server, "judge", key="k"), {}, kept.append)
    assert [path for path, _, _ in Server.asked] == ["/v1/chat/completions"] * 2
    assert Server.asked[0][1] == "Bearer k"
    texts = [body["messages"][0]["content"] for *_, body in Server.asked]
    assert "assistant 1: a man\n" in texts[0] and "assistant 2: a man\n" in texts[1]
    assert all("Who {first} speaks?" in text and "a {question} woman" in text for text in texts)
    assert ratings == kept and (ratings[0]["model"], ratings[0]["reference"]) == ([4, 9], [9, 4])
    assert score_chat(ratings)["speech"] == {"answers": 1, "unread": 0, "model": 6.5, "reference": 6.5, "wins": 0.5}
    assert judge_chat(rows, samples, Judge(server, "judge"), {samples[0].id: kept[0]}, kept.append) == ratings
    assert len(Server.asked) == 2 and len(kept) == 1
    Server.said = "The first one gets 9, the other 4"
    ratings = judge_chat(rows, samples, Judge(server, "judge"), {}, kept.append)
    assert score_chat(ratings)["speech"] == {"answers": 1, "unread": 2}


def test_faults_of_a_judge_are_one_line(server):
    texts = dict.fromkeys(("audio", "question", "first", "second"), "x")
    for judge, fault in (
        (Judge(server, "other"), r"/v1: the judge answered with status 404; look at its address, model 'other'"),
        (Judge("http://127.0.0.1:9/v1", "judge"), "9/v1: the judge cannot be reached"),
    ):
        with pytest.raises(ValueError, match=fault):
            judge.rate(**texts)
    with pytest.raises(ValueError, match="judge = 'localhost:8000', but it must be an address such as http://"):
        Judge("localhost:8000", "judge")
    with pytest.raises(ValueError, match=r"the judge's prompt lacks \{second\}"):
        Judge(server, "judge", prompt="{audio} {question} {first}")


@pytest.mark.parametrize(
    ("text", "scores"),
    [("8 7", (8, 7)), (" 10, 1.\n", (10, 1)), ("8", None), ("11 2", None), ("0 5", None), ("8 7 6", None),
     ("8.5 7", None)],
)  # fmt: skip
def test_scores_of_a_judge(text, scores):
    assert airbench.scores_in(text) == scores


# ---------------------------------------------------------------- classes


LABELS = ["anger", "joy", "throat clearing"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [("anger", "anger"), ("Joy.", "joy"), ("The person is clearing: throat clearing.", "throat clearing"),
     ("It is joy", "joy"), ("joy or anger", None), ("not anger", None), ("enjoyable", None), ("", None)],
)  # fmt: skip
def test_the_label_that_an_answer_names(answer, label):
    assert named_label(answer, LABELS) == label


def test_labels_of_a_manifest_count_where_the_reference_is_one():
    assert labels_of(LABELS, "Joy") == LABELS
    for value in (None, "anger", ["anger"], ["Joy", "joy"], [1, 2], {"joy": 1}, ["anger", ""]):
        assert labels_of(value, "joy") is None
    assert labels_of(LABELS, "fear") is None


def rows_of(pairs, **more):
    return [
        {"sample": str(i), "task": "emotion", "reference": wanted, "answer": given, "right": wanted == given,
         "normaliser": "x"} | more
        for i, (wanted, given) in enumerate(pairs)
    ]  # fmt: skip


def test_macro_f1_and_the_matrix_by_hand():
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "perhaps"), ("c", "c"), ("c", "c")]
    found = classes_of(rows_of(pairs))
    assert found == [("a", "a"), ("a", "b"), ("b", "b"), ("b", None), ("c", "c"), ("c", "c")]
    confusion = confusion_of(found)
    assert confusion == (["a", "b", "c"], [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 2, 0]])
    # a: 2·1/(2+1), b: 2·1/(2+2), c: 1
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    scores = score_rows(rows_of(pairs))
    assert scores.accuracy["emotion"] == 4 / 6 and scores.macro_f1["emotion"] == macro_f1(confusion)
    low, high = scores.intervals["emotion"]["accuracy"]
    assert 0 <= low < 4 / 6 < high <= 1
    assert scores.text_of("emotion") == "accuracy 66.7% · macro F1 72.2%"


def test_texts_that_hardly_repeat_are_no_classes():
    assert classes_of(rows_of([("a", "a"), ("b", "b"), ("c", "c")])) is None
    assert classes_of(rows_of([("a", "a"), ("a", "b")])) is None


def test_the_picture_of_a_matrix_is_a_picture_and_the_same_each_time(tmp_path):
    confusion = confusion_of([("a $b$", "a $b$"), ("c", None)] * 3)
    for name in ("1.png", "2.png"):
        classes.draw(confusion, "emotion $x", tmp_path / name)
    first = (tmp_path / "1.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "2.png").read_bytes()


# ---------------------------------------------------------------- translations


def test_bleu_is_sacrebleus():
    references = ["the cat sits on the mat today", "a dog barks", "we go home", "nothing of this"]
    answers = ["the cat sat on the mat today", "a dog barks loudly", "", "something else"]
    for chosen in ([0, 1, 2, 3], [3], [2], [1], [2, 3]):
        one, other = [references[i] for i in chosen], [answers[i] for i in chosen]
        expected = sacrebleu.corpus_bleu(other, [one]).score
        found = translation.bleu_of(translation.statistics(one, other, "de").sum(0))
        assert float(found) == pytest.approx(expected, abs=1e-9), chosen


def test_translations_are_scored_with_signatures_and_intervals():
    rows = [
        {"sample": str(i), "task": "translate", "reference": f"das ist ein Satz mit {word}", "target_lang": "de",
         "answer": f"das ist ein Satz mit {word if i % 2 else 'x'}", "normaliser": "sacrebleu"}
        for i, word in enumerate("abcdefgh")
    ]  # fmt: skip
    scores = score_rows(rows)
    assert set(scores.bleu) == set(scores.chrf) == {"translate"} and not scores.accuracy
    low, high = scores.intervals["translate"]["BLEU"]
    assert low < scores.bleu["translate"] < high
    assert scores.normaliser["translate"].startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "chrF2|" in scores.normaliser["translate"]
    rows += [row | {"sample": f"z{row['sample']}", "target_lang": "zh-CN"} for row in rows]
    scores = score_rows(rows)
    assert set(scores.bleu) == {"translate (de)", "translate (zh-CN)"}
    assert "tok:zh" in scores.normaliser["translate (zh-CN)"]


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("de", "13a"), ("zh-CN", "zh"), ("Chinese", "zh"), ("ja", "char"), ("th", "char"), (None, "13a"), ("na", "13a")],
)
def test_the_tokenizer_follows_the_target_language(language, tokenizer):
    assert translation.tokenizer_for(language) == tokenizer


# ---------------------------------------------------------------- normalisers


def test_a_normaliser_can_be_chosen_for_all_languages():
    text = "Twenty-five, हिन्दी (uh)"
    words = {name: words_of(text, rules_for([text], None, name)[0]) for name in NORMALISERS}
    assert words["english"][0] == "25" and words["basic"][:2] == ["twenty", "five"]
    assert "हिन्दी" in words["basic"] and words["characters"][0] == "t"
    assert words["none"] == ["Twenty-five,", "हिन्दी", "(uh)"]
    with pytest.raises(ValueError, match="normaliser = 'whisper', but it must be one of auto, english, basic, char"):
        rules_for([text], None, "whisper")
    assert rules_for([text], None, "none")[0].name == "none (words between white space)"
