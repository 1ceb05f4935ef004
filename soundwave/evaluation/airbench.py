"""AIR-Bench (arXiv 2402.07729) from a local copy: the questions of its foundation part, and its chat, with a judge.

    Foundation/Foundation_meta.json                                     a list of questions
    Foundation/Speech_Grounding_librispeech/….wav                       <task_name>_<dataset_name>/<path>
    Chat/Chat_meta.json, Chat/speech_QA_…/….wav                         likewise

Foundation questions have up to four options. Two rules score an answer:

    strict      the option that it names by the parser of `soundwave.evaluation.choices`; an answer that names none is
                wrong
    benchmark   what score_foundation.py of the benchmark does: its first character if that is A, B, C or D, else the
                last but one; an answer with neither is left out of the count. A model that often answers with something
                else gains by this rule

Two things differ from the benchmark's scripts: options that a question lacks are not written as "C. None", and no other
language model is asked which option an answer means.

Chat answers are rated by a judge, any server that speaks OpenAI's chat completions: it reads the description of the
recording, the question, the benchmark's answer and the model's, and gives each 1 to 10. Both orders are asked, because
a judge favours a place. The wording is ours (`JUDGE_PROMPT`), so that figures compare with each other, but not with the
leaderboard's; a file with the benchmark's own wording can replace it. Nothing is sent anywhere without a judge's
address.
"""

import json
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from soundwave.data.audio import shown
from soundwave.data.manifest import Sample
from soundwave.evaluation.choices import named_option, texts_of
from soundwave.evaluation.corpora import folder_with, inside

LABELS = "ABCD"
INSTRUCTION = (
    "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
    "you may only choose A or B or C or D."
)
JUDGE_PROMPT = """Two assistants answered a question about a recording. Rate both answers.

Description of the recording: {audio}
Question: {question}

Answer of assistant 1: {first}

Answer of assistant 2: {second}

Judge how helpful, relevant, accurate and complete each answer is, by the description of the recording. Write one line \
with two whole numbers from 1 (worst) to 10 (best), separated by a space: first that of assistant 1, then that of \
assistant 2. Write nothing else.
"""
PLACES = ("{audio}", "{question}", "{first}", "{second}")
PARTS = {
    "speech_QA": "speech",
    "speech_dialogue_QA": "speech",
    "sound_QA": "sound",
    "sound_generation_QA": "sound",
    "music_QA": "music",
    "music_generation_analysis_QA": "music",
    "speech_and_sound_QA": "mixed audio",
    "speech_and_music_QA": "mixed audio",
}
TIMEOUT = 120  # seconds for an answer of the judge


class Foundation(NamedTuple):
    """The score of a task.

    Attributes:
        questions: how many were answered.
        strict: share of right answers, of all.
        benchmark: by the benchmark's rule; None if that counts no answer.
        unparsed, dropped: answers that name no option by the parser, and by the benchmark's rule.
    """

    questions: int
    strict: float
    benchmark: float | None
    unparsed: int
    dropped: int


def read_foundation(folder: Path, prompt: str | None = None) -> list[Sample]:
    """The questions of the foundation part. `prompt` replaces the instruction before each of them."""
    samples = []
    for place, entry, audio in _entries(folder, "Foundation"):
        options = {}
        for label in LABELS:
            text = entry.get(f"choice_{label.lower()}")
            if text is not None:
                options[label] = str(text)
        right = [label for label, text in options.items() if text == str(entry["answer_gt"])]
        if len(options) < 2 or not right:
            raise ValueError(f"{place}: answer_gt = {entry['answer_gt']!r} is none of its options; copy the file again")
        lines = [
            prompt or INSTRUCTION,
            str(entry["question"]),
            *(f"{label}. {text}" for label, text in options.items()),
        ]
        samples.append(
            Sample(
                id=place,
                audio=audio,
                task=f"{entry['task_name']}_{entry['dataset_name']}",
                prompt="\n".join(lines),
                answer=right[0],
                extra={"options": options},
            )
        )
    return samples


def read_chat(folder: Path, prompt: str | None = None) -> list[Sample]:
    """The questions of the chat part. `prompt` is put before each of them."""
    samples = []
    for place, entry, audio in _entries(folder, "Chat"):
        question = str(entry["question"])
        samples.append(
            Sample(
                id=place,
                audio=audio,
                task=str(entry["task_name"]),
                prompt=f"{prompt}\n{question}" if prompt else question,
                answer=str(entry["answer_gt"]),
                extra={"question": question, "meta_info": str(entry.get("meta_info", ""))},
            )
        )
    return samples


def benchmark_option(answer: str) -> str | None:
    """The option that an answer names by the benchmark's own rule, None if it names none."""
    text = answer.strip().replace("\n", "")
    if not text or text == "None":
        return None
    if text[0] in LABELS:
        return text[0]
    return text[-2] if len(text) > 1 and text[-2] in LABELS else None


def score_foundation(rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> dict[str, Foundation]:
    """The score of each task, from the rows of an evaluation; "average" is the mean of the tasks."""
    options = {sample.id: sample.extra["options"] for sample in samples}
    tasks: dict[str, list[tuple[str | None, str | None, str]]] = defaultdict(list)
    for row in rows:
        parsed = named_option(row["answer"], texts_of(options[row["sample"]])), benchmark_option(row["answer"])
        tasks[row["task"]].append((*parsed, row["reference"]))
    found = {}
    for task, answers in sorted(tasks.items()):
        counted = [(given, right) for _, given, right in answers if given is not None]
        own = sum(given == right for given, right in counted) / len(counted) if counted else None
        strict = sum(given == right for given, _, right in answers) / len(answers)
        unparsed = sum(given is None for given, _, _ in answers)
        found[task] = Foundation(len(answers), strict, own, unparsed, len(answers) - len(counted))
    if found:
        each, own = list(found.values()), [one.benchmark for one in found.values() if one.benchmark is not None]
        found["average"] = Foundation(
            sum(one.questions for one in each),
            sum(one.strict for one in each) / len(each),
            sum(own) / len(own) if own else None,
            sum(one.unparsed for one in each),
            sum(one.dropped for one in each),
        )
    return found


class Judge:
    """A server of OpenAI's chat completions that rates answers.

    Args:
        url: its address, up to and with "/v1".
        model: the model's name there.
        key: sent as a bearer token, if there is one.
        prompt: what it is asked, with the places {audio}, {question}, {first} and {second}.

    Raises:
        ValueError: the address is none, or the prompt lacks a place.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, prompt: str = JUDGE_PROMPT):
        if not re.match(r"https?://[^/\s]", url):
            raise ValueError(f"judge = {url!r}, but it must be an address such as http://localhost:8000/v1")
        if missing := [place for place in PLACES if place not in prompt]:
            raise ValueError(f"the judge's prompt lacks {missing[0]}; it needs {', '.join(PLACES)}")
        self.url, self.model, self.key, self.prompt = url.rstrip("/"), model, key, prompt

    def rate(self, **texts: str) -> tuple[str, tuple[int, int] | None]:
        """What the judge says of `audio`, `question`, `first` and `second`, and the two scores in it, if they are."""
        content = re.sub(r"\{(audio|question|first|second)\}", lambda match: texts[match[1]], self.prompt)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                said = json.load(response)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self.url}: the judge answered with status {error.code}; look at its address, model "
                             f"{self.model!r} and key") from None  # fmt: skip
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{self.url}: what the judge answered is no chat completion") from None
        except OSError as error:
            raise ValueError(f"{self.url}: the judge cannot be reached ({getattr(error, 'reason', error)})") from None
        return said, scores_in(said)


def scores_in(text: str) -> tuple[int, int] | None:
    """The two scores from 1 to 10 on a line of their own, None if there are not just two."""
    match = re.fullmatch(r"(10|[1-9])[\s,;/]+(10|[1-9])\.?", text.strip())
    return (int(match[1]), int(match[2])) if match else None


def judge_chat(
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    judge: Judge,
    known: Mapping[str, Mapping[str, Any]],
    each: Callable[[dict[str, Any]], None],
) -> list[Mapping[str, Any]]:
    """Let a judge rate each answer in both orders.

    Args:
        known: sample -> what the judge said of it before; it is not asked again.
        each: called with each new rating: sample, task, said (two texts), scores of the model and of the benchmark's
            answer (None where the judge gave none).
    """
    about = {sample.id: sample for sample in samples}
    found: list[Mapping[str, Any]] = []
    for row in rows:
        if row["sample"] in known:
            found.append(known[row["sample"]])
            continue
        extra = about[row["sample"]].extra
        texts = {"audio": extra["meta_info"], "question": extra["question"]}
        one, other = row["reference"], row["answer"]
        said, scores = [], []
        for first, second in ((one, other), (other, one)):
            text, pair = judge.rate(**texts, first=first, second=second)
            said.append(text)
            scores.append(pair)
        model = [None if pair is None else pair[1 - place] for place, pair in enumerate(scores)]
        reference = [None if pair is None else pair[place] for place, pair in enumerate(scores)]
        rating = {"sample": row["sample"], "task": row["task"], "said": said, "model": model, "reference": reference}
        each(rating)
        found.append(rating)
    return found


def score_chat(ratings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """For each part of the benchmark the mean scores over both orders, and how many ratings could not be read.

    Returns:
        part -> answers, model, reference, wins (share of ratings in which the model has the higher score), unread.
    """
    parts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for rating in ratings:
        parts[PARTS.get(rating["task"], rating["task"])].append(rating)
    found: dict[str, dict[str, float | int]] = {}
    for part, rated in parts.items():
        pairs = [pair for one in rated for pair in zip(one["model"], one["reference"], strict=True)]
        read = [(model, reference) for model, reference in pairs if model is not None]
        found[part] = {"answers": len(rated), "unread": len(pairs) - len(read)}
        if read:
            found[part]["model"] = sum(model for model, _ in read) / len(read)
            found[part]["reference"] = sum(reference for _, reference in read) / len(read)
            found[part]["wins"] = sum(model > reference for model, reference in read) / len(read)
    return found


def _entries(folder: Path, part: str) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """The entries of a part's list, each with its place and recording."""
    table = folder_with(folder, (f"{part}_meta.json", f"{part}/{part}_meta.json"), f"AIR-Bench's {part}")
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{shown(table)}: is no list of questions; copy it again")
    keys = ("path", "question", "answer_gt", "task_name", "dataset_name")
    for number, entry in enumerate(entries, start=1):
        place = f"{table.name}:{number}"
        if not isinstance(entry, dict) or (missing := [key for key in keys if entry.get(key) is None]):
            raise ValueError(f"{place}: lacks {'all keys' if not isinstance(entry, dict) else missing[0]}")
        name = f"{entry['task_name']}_{entry['dataset_name']}/{entry['path']}"
        audio = inside(table.parent, name, place)
        if not audio.is_file():  # the recordings of Audio_Grounding are named .wav, but are FLAC
            audio = next((file for file in [audio.with_suffix(".flac")] if file.is_file()), audio)
        yield place, entry, audio
