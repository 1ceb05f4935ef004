"""Greedy answers from drafts: the tokens are those of plain greedy decoding, whatever the draft is."""

import json
import random
import threading

import numpy as np
import pytest
import soundfile
import torch

from soundwave.inference import drafts
from soundwave.inference.answer import (
    DRAFTS,
    LoadedModel,
    answer,
    certainty,
    check_draft,
    draft_ids,
    end_tokens,
    read_ctc,
)
from soundwave.inference.drafts import FEWEST, MISSES, DraftCounts, _rest, decode_drafts, reason_against_drafts
from soundwave.inference.long import transcribe
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

NEW = 14
PROMPTS = ["Write down every word.", "What is said?", "Transcribe the speech, word for word, please.", "Again:", "Hm"]


@pytest.fixture(scope="module")
def loaded(model_folders):
    """The untrained model in float32, where no two tokens are equally probable up to rounding."""
    model = SoundwaveForConditionalGeneration.from_pretrained(model_folders[3], dtype=torch.float32)
    return model.eval(), SoundwaveProcessor.from_pretrained(model_folders[3])


@pytest.fixture(scope="module")
def clips(loaded, tiny_corpus):
    rows = [json.loads(line) for line in (tiny_corpus / "stage1.jsonl").read_text().splitlines()[: len(PROMPTS)]]
    return [loaded[1].features(soundfile.read(tiny_corpus / row["audio_filepath"], dtype="float32")[0]) for row in rows]


@pytest.fixture(scope="module")
def prompts(loaded, clips):
    """Embeddings and mask of prompts of several lengths, one of them without a recording."""
    model, processor = loaded
    batch = processor(PROMPTS, [*clips[:-1], None])
    return model.embed_prompts(**batch)[:2]


@pytest.fixture(scope="module")
def greedy(loaded, prompts):
    """What transformers' own greedy decoding writes, one prompt at a time: no batch, no padding."""
    model, processor = loaded
    embeddings, mask = prompts
    ends = sorted(end_tokens(*loaded))
    return [
        model.language_model.generate(
            inputs_embeds=row[seen.bool()][None], attention_mask=seen[seen.bool()][None], max_new_tokens=NEW,
            do_sample=False, eos_token_id=ends, pad_token_id=processor.pad_token_id,
        )[0].tolist()
        for row, seen in zip(embeddings, mask, strict=True)
    ]  # fmt: skip


def test_threads_that_decode_at_once_share_loras_switch(model_folders):
    model = SoundwaveForConditionalGeneration.from_pretrained(model_folders[3], dtype=torch.bfloat16)
    layers = [layer for layer in model.language_model.modules() if hasattr(layer, "cast_input_dtype_enabled")]
    assert layers

    def casts() -> set[bool]:
        return {layer.cast_input_dtype_enabled for layer in layers}

    begun, end = threading.Event(), threading.Event()

    def decode() -> None:
        with model.decoding():
            begun.set()
            assert end.wait(20)

    other = threading.Thread(target=decode)
    with model.decoding():
        other.start()
        assert begun.wait(20) and casts() == {False}
    assert casts() == {False}  # the other thread is at work
    end.set()
    other.join(20)
    assert casts() == {True}


def damaged(tokens, rng):
    """Tokens of which some are replaced, left out or doubled."""
    out = []
    for token in tokens:
        kind = rng.choice(["kept"] * 5 + ["replaced", "left out", "doubled"])
        out += {"kept": [token], "replaced": [rng.randrange(5, 40_000)], "left out": [], "doubled": [token] * 2}[kind]
    return out


@pytest.mark.parametrize("seed", range(6))
def test_any_draft_gives_the_tokens_of_greedy_decoding(loaded, prompts, greedy, seed):
    rng = random.Random(seed)
    given = [damaged(tokens, rng)[: rng.choice([3, 9, 99])] for tokens in greedy]
    given[seed % len(given)] = rng.choice([[], [7] * 40, greedy[0]])
    counts = DraftCounts()
    assert decode_drafts(loaded[0], *prompts, given, end_tokens(*loaded), NEW, counts) == greedy
    assert counts.clips == len(greedy) and counts.tokens == sum(map(len, greedy))
    assert 0 < counts.accepted <= counts.tokens - counts.clips and counts.forwards + counts.accepted >= counts.tokens


def test_a_right_draft_takes_one_forward_and_none_takes_one_a_token(loaded, prompts, greedy):
    right, none = DraftCounts(), DraftCounts()
    assert decode_drafts(loaded[0], *prompts, greedy, end_tokens(*loaded), NEW, right) == greedy
    assert decode_drafts(loaded[0], *prompts, [[]] * len(greedy), end_tokens(*loaded), NEW, none) == greedy
    assert right.forwards == len(greedy) and none.forwards == none.tokens and none.accepted == 0


def test_a_useless_draft_costs_little(loaded, prompts, greedy, monkeypatch):
    """In every forward after the first one few tokens are tried, soon none; what is refused leaves the cache."""
    rows, cached = [], []
    decoder = loaded[0].language_model.base_model

    def forward(**given):
        rows.append(given["inputs_embeds"].shape[1])
        cached.append(given["past_key_values"].get_seq_length())
        return type(decoder).forward(decoder, **given)

    monkeypatch.setattr(decoder, "forward", forward)
    useless = [[7] * 200 for _ in greedy]
    assert decode_drafts(loaded[0], *prompts, useless, end_tokens(*loaded), NEW) == greedy
    size = prompts[1].shape[1]
    assert rows == [size + NEW - 1, 1 + FEWEST, 1 + FEWEST, *[1] * (NEW - MISSES)]
    assert cached == [0, *range(size, size + NEW - 1)]


def test_what_follows_a_mistake_is_tried_to_its_end(loaded, prompts, greedy):
    """With one wrong token in each draft: its beginning, the rest as far as it is trusted, and what is left of that."""
    given, counts = [[7, *tokens] for tokens in greedy], DraftCounts()
    assert decode_drafts(loaded[0], *prompts, given, end_tokens(*loaded), NEW, counts) == greedy
    assert counts.forwards <= 3 * len(greedy)


def test_logits_are_made_piece_by_piece(loaded, prompts, greedy, monkeypatch):
    monkeypatch.setattr(drafts, "LOGITS", 3 * 49_152 * len(greedy))
    head, sizes = loaded[0].language_model.get_output_embeddings(), []
    monkeypatch.setattr(head, "forward", lambda x: sizes.append(x.shape[1]) or type(head).forward(head, x))
    assert decode_drafts(loaded[0], *prompts, greedy, end_tokens(*loaded), NEW) == greedy
    assert sum(sizes) == NEW and max(sizes) <= 3


@pytest.mark.parametrize("most", [1, 2, 5])
def test_an_answer_ends_at_its_limit(loaded, prompts, greedy, most):
    found = decode_drafts(loaded[0], *prompts, greedy, end_tokens(*loaded), most)
    assert found == [tokens[:most] for tokens in greedy]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("most", [0, -3])
def test_an_answer_of_no_tokens_is_refused_with_drafts_too(loaded, clips, most, draft):
    with pytest.raises(ValueError, match=f"max_new_tokens = {most}, but it must be 1 or more"):
        answer(*loaded, PROMPTS[:1], clips[:1], max_new_tokens=most, draft=draft)


def test_an_answer_ends_at_its_first_end_token(loaded, prompts, greedy):
    """In the draft, or as the token that follows what is accepted."""
    ends = {greedy[0][4], greedy[1][7]}
    expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in ends), NEW)] for tokens in greedy]
    for given in (greedy, [tokens[:4] for tokens in greedy], [[]] * len(greedy)):
        assert decode_drafts(loaded[0], *prompts, given, ends, NEW) == expected


@pytest.mark.parametrize(
    ("draft", "written", "rest"),
    [
        ([1, 2, 3], 9, [2, 3]),
        ([1, 2, 3], 2, [3]),
        ([1, 2, 3], 3, []),
        ([1], 9, []),
        ([], 9, []),
        ([1, 1, 2], 1, [1, 2]),
    ],
    ids=["replaced", "one too much", "two too much", "at the end", "no draft left", "as drafted"],
)
def test_where_a_draft_goes_on(draft, written, rest):
    assert _rest(draft, written) == rest


@pytest.mark.parametrize("size", [1, 3])
def test_transcripts_are_the_same_with_drafts(loaded, clips, size):
    texts = {}
    for draft in DRAFTS:
        texts[draft] = []
        for start in range(0, len(clips), size):
            some = clips[start : start + size]
            texts[draft] += answer(*loaded, PROMPTS[: len(some)], some, max_new_tokens=NEW, draft=draft)
    assert texts["ctc"] == texts["none"] and all(texts["ctc"])


def test_the_draft_is_what_ctc_reads_as_an_answer_would_write_it(loaded, clips):
    model, processor = loaded
    texts, path = read_ctc(model, processor, clips[:2])
    for text, row in zip(texts, path, strict=True):
        assert processor.tokenizer.decode(draft_ids(model, processor, row)) == text


def test_prompts_without_a_recording_may_stand_among_others(loaded, clips):
    audio = [None, clips[0], None]
    with_drafts = answer(*loaded, PROMPTS[:3], audio, max_new_tokens=6, draft="ctc")
    assert with_drafts == answer(*loaded, PROMPTS[:3], audio, max_new_tokens=6)
    assert answer(*loaded, PROMPTS[:1], [None], max_new_tokens=6, draft="ctc") == with_drafts[:1]


def test_cut_off_answers_are_named(loaded, clips):
    cut_off: list[int] = []
    answer(*loaded, PROMPTS[:2], clips[:2], max_new_tokens=2, draft="ctc", cut_off=cut_off)
    assert cut_off == [0, 1]


@pytest.mark.parametrize(
    ("path", "probability", "expected"),
    [
        ([9, 9, 3, 3, 9, 4], [0.9, 0.2, 0.5, 0.8, 0.9, 0.7], 0.7),  # of a token its most probable frame; blanks no say
        ([3, 9, 3, 4], [0.6, 0.1, 0.9, 0.9], 0.6),  # the same token twice
        ([3, 4, 4, -1, -1], [0.9, 0.3, 0.4, 1.0, 1.0], 0.4),  # no frame of the padding
        ([9, 9, -1], [0.1, 0.2, 1.0], 1.0),  # nothing is read
        ([], [], 1.0),
    ],
)
def test_a_draft_is_as_certain_as_its_least_sure_token(path, probability, expected):
    found = certainty(torch.tensor(path, dtype=torch.int64), torch.tensor(probability).log(), blank=9)
    assert found == pytest.approx(expected)


def test_sure_drafts_are_accepted_unread_and_the_others_checked(loaded, clips):
    """With a threshold between the clips' certainties: CTC's text above it, greedy decoding's below."""
    model, processor = loaded
    given, prompts = [clips[0], None, *clips[1:3]], ["Hm", *PROMPTS[:3]]
    plain = answer(*loaded, prompts, given, max_new_tokens=NEW)
    batch = processor(prompts, given)
    path, scores = model.embed_prompts(**batch)[2]
    sure = [certainty(*clip, model.blank) for clip in zip(path, scores, strict=True)]
    assert len(set(sure)) == 3
    counts = DraftCounts()
    found = answer(*loaded, prompts, given, max_new_tokens=99, draft="ctc", accept=sorted(sure)[1], counts=counts)
    assert (counts.unread, counts.clips) == (2, 2)
    read = iter(read_ctc(*loaded, [clip for clip in given if clip is not None])[0])
    certain = iter(sure)
    for clip, text, without, alone in zip(given, found, plain, range(4), strict=True):
        if clip is not None and (reading := next(read)) is not None and next(certain) >= sorted(sure)[1]:
            assert text == reading.strip(), alone
        else:
            assert text.startswith(without[:10]), alone
    every = DraftCounts()
    answer(*loaded, prompts[:1], given[:1], draft="ctc", accept=0.0, counts=every)
    assert (every.unread, every.clips, every.forwards) == (1, 0, 0)


def test_a_transcript_may_be_what_ctc_reads(loaded):
    """With a threshold that every clip reaches the text is CTC's, and the language model is not asked at all."""
    model, _ = loaded
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    asked = []
    hook = model.language_model.base_model.register_forward_hook(lambda *_: asked.append(1))
    found = transcribe(samples, LoadedModel(*loaded), accept=0.0)
    hook.remove()
    assert not asked and found.text == " ".join(read_ctc(*loaded, [loaded[1].features(samples)])[0][0].split())


@pytest.mark.parametrize(
    ("draft", "accept", "message"),
    [
        ("none", 0.9, "accept = 0.9, but without drafts there is nothing to accept"),
        ("ctc", 1.5, "accept = 1.5, but it is a probability"),
        ("ctc", float("nan"), "accept = nan, but it is a probability"),
    ],
)
def test_a_threshold_that_means_nothing_is_refused(draft, accept, message):
    with pytest.raises(ValueError, match=message):
        check_draft(draft, accept)


def test_another_draft_is_refused_before_the_model_is_loaded():
    for draft in ("CTC", "", None):
        with pytest.raises(ValueError, match="draft = .* must be 'ctc' or 'none'"):
            transcribe([0.0] * 16_000, "no-such-folder", draft=draft)


def test_a_language_model_that_cannot_check_drafts_says_so(loaded, clips, monkeypatch):
    model, processor = loaded
    assert reason_against_drafts(model.language_model) == ""
    monkeypatch.setattr(model.language_model.config, "sliding_window", 8, raising=False)
    expected = answer(*loaded, PROMPTS[:1], clips[:1], max_new_tokens=4)
    with pytest.warns(UserWarning, match="writes without drafts, because its attention has a sliding window"):
        assert answer(*loaded, PROMPTS[:1], clips[:1], max_new_tokens=4, draft="ctc") == expected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_rotary_embeddings_that_change_with_the_length_are_refused(loaded, monkeypatch, kind, nested):
    rope = {"rope_type": kind, "rope_theta": 1e4}
    config = loaded[0].language_model.config
    monkeypatch.setattr(config, "rope_parameters", {"full_attention": rope} if nested else rope)
    assert reason_against_drafts(loaded[0].language_model) == f"its rotary embeddings are of the type {kind!r}"
