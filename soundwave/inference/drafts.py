"""Greedy answers from drafts: the language model checks a whole text in one forward, instead of writing it by tokens.

Our CTC path is written in the language model's own tokens, so what it reads is a draft of the transcript for nothing.
The draft stands behind the prompt; one forward tells for each of its tokens which one greedy decoding would have
written in its place. The longest prefix on which both agree is accepted, and one token more, which the same forward
has told. From there the rest of the draft is tried again, if it can be found where it goes on: `GROWTH` times as many
tokens as were accepted last and `FEWEST` more, and none after `MISSES` tries in a row without any, so that a useless
draft costs little more than plain greedy decoding. Each forward writes at least one token.

Exact: the tokens are those of greedy decoding. In half precision two tokens that are equally probable up to rounding
may change places, as they may between two batch sizes. What is verified at once, and how (speculative decoding with
greedy acceptance), is that of Stern et al., 2018 (arXiv 1811.03115); that CTC drafts is ours to use because the labels
are the language model's own tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from soundwave.kernels.vocab_rows import argmax
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.packed import decode_packed, reason_against_packing
from soundwave.model.processing import pad

GROWTH, FEWEST, MISSES = 4, 8, 3
LOGITS = 1 << 26  # that are held at once
LOOK_AHEAD = 4  # tokens of the draft among which the language model's own word is looked for after a disagreement


@dataclass
class DraftCounts:
    """What drafts have saved, over all clips that were answered with it.

    Attributes:
        clips: clips that the language model has answered.
        tokens: tokens of the answers, with the end token.
        accepted: those of them that were a draft's.
        forwards: forwards of the language model, summed over the clips of each batch.
        unread: further clips whose draft was accepted without it.
    """

    clips: int = 0
    tokens: int = 0
    accepted: int = 0
    forwards: int = 0
    unread: int = 0


def reason_against_drafts(language_model: Any) -> str:
    """The reason why a language model cannot check drafts exactly; empty if it can."""
    if getattr(language_model, "runs_elsewhere", False):
        return "it runs in another process"
    config = language_model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        return f"it has layers of the kind {kinds[0]!r}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if getattr(language_model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    if not hasattr(language_model.base_model, "rotary_emb"):
        return "it has no rotary embeddings"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):  # the draft's length would change them
            return f"its rotary embeddings are of the type {kind!r}"
    return ""


def _best(head: nn.Module, states: Tensor) -> list[int]:
    """The most probable token after each of `states` [n, D], of equals the first; few logits are held at once."""
    step = max(1, LOGITS // head.weight.shape[0])
    return [token for part in states.split(step) for token in argmax(head(part)).tolist()]


class _Cache(NamedTuple):
    """Keys and values of the clips that go on, and bool [B, columns], the columns of each that are looked at."""

    values: DynamicCache
    seen: Tensor


# Called with the places of the clips that go on and how many draft tokens of each were accepted.
_Keep = Callable[[list[int], list[int]], _Cache]


def _first_forward(
    model: SoundwaveForConditionalGeneration, embeddings: Tensor, mask: Tensor, tried: list[list[int]]
) -> tuple[list[list[int]], _Keep]:
    """Prompts and drafts in one forward, on packed rows if the language model can.

    Returns:
        For each clip the most probable tokens after its prompt and after each token of its draft; and what to keep.
    """
    language_model, device = model.language_model, embeddings.device
    embed, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    if reason_against_packing(language_model):
        cache = _Cache(DynamicCache(config=language_model.config), mask[:, :0].bool())
        return _forward(language_model, cache, embeddings, mask.bool(), tried)
    prompts = mask.sum(1).tolist()
    lengths = [prompt + len(draft) for prompt, draft in zip(prompts, tried, strict=True)]
    bounds = [0, *accumulate(lengths)]
    drafts = torch.tensor([token for draft in tried for token in draft], dtype=torch.int64, device=device)
    drafts = embed(drafts).to(embeddings.dtype).split([len(draft) for draft in tried])
    parts = [(row[len(row) - prompt :], draft) for row, prompt, draft in zip(embeddings, prompts, drafts, strict=True)]
    rows = torch.cat([part for both in parts for part in both])
    wanted = [range(bounds[i] + prompts[i] - 1, bounds[i + 1]) for i in range(len(tried))]
    packed = DynamicCache(config=language_model.config)
    states = decode_packed(
        language_model,
        rows,
        torch.tensor(bounds, device="cpu"),
        max(lengths),
        torch.tensor([place for places in wanted for place in places], device="cpu"),
        packed,
    )
    found = iter(_best(head, states))
    best = [[next(found) for _ in places] for places in wanted]

    def keep(places: list[int], agreed: list[int]) -> _Cache:
        counts = torch.tensor([prompts[place] + count for place, count in zip(places, agreed, strict=True)])
        column = torch.arange(int(counts.max()))
        seen = column < counts[:, None]
        index = (torch.tensor(bounds)[places][:, None] + column).where(seen, 0).to(device)
        kept = DynamicCache(config=language_model.config)
        for number, layer in enumerate(packed.layers):
            kept.update(*(x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values)), number)
        return _Cache(kept, seen.to(device))

    return best, keep


def _forward(
    language_model: Any, cache: _Cache, rows: Tensor, inside: Tensor, tried: list[list[int]]
) -> tuple[list[list[int]], _Keep]:
    """One padded forward: `rows` [B, L, D], of which those are looked at that `inside` bool [B, L] names, and drafts.

    The rows end with what stands before the drafts. Returns are those of `_first_forward`.
    """
    device, width = rows.device, max(map(len, tried))
    drafts = pad(tried, 0, "right")[:, :width].to(device)
    lengths = torch.tensor([len(draft) for draft in tried], device=device)
    seen = torch.cat([cache.seen, inside, torch.arange(width, device=device) < lengths[:, None]], 1)
    rows = torch.cat([rows, language_model.get_input_embeddings()(drafts).to(rows.dtype)], 1)
    states = language_model.base_model(
        inputs_embeds=rows,
        attention_mask=seen.to(torch.int64),
        position_ids=(seen.cumsum(1) - 1).clamp_(min=0)[:, -rows.shape[1] :],
        past_key_values=cache.values,
        use_cache=True,
    ).last_hidden_state[:, -width - 1 :]
    found = _best(language_model.get_output_embeddings(), states.flatten(0, 1))
    best = [found[start : start + width + 1] for start in range(0, len(found), width + 1)]

    def keep(places: list[int], agreed: list[int]) -> _Cache:
        start, longest = seen.shape[1] - width, max(agreed)
        if longest < width:  # what nobody has accepted leaves the cache
            cache.values.crop(longest - width)
        if len(places) < len(tried):
            cache.values.batch_select_indices(torch.tensor(places, dtype=torch.int64, device=device))
        kept = seen[places, : start + longest]
        for row, count in zip(kept, agreed, strict=True):
            row[start + count :] = False  # what was not accepted is never looked at
        return _Cache(cache.values, kept)

    return best, keep


@torch.no_grad()
def decode_drafts(
    model: SoundwaveForConditionalGeneration,
    embeddings: Tensor,
    mask: Tensor,
    drafts: Sequence[Sequence[int]],
    ends: set[int],
    max_new_tokens: int,
    counts: DraftCounts | None = None,
) -> list[list[int]]:
    """The language model's greedy answers after prompts, for which it tries `drafts` first.

    Args:
        embeddings, mask: [B, L, D] and [B, L], the prompts, padded on the left.
        drafts: for each prompt the tokens of a draft, which may be empty.
        ends: the tokens that end an answer.
        max_new_tokens: longest answer, in tokens.
        counts: is added to.

    Returns:
        The tokens of each answer, up to its end token, or to `max_new_tokens`.
    """
    language_model = model.language_model
    embed = language_model.get_input_embeddings()
    answers: list[list[int]] = [[] for _ in drafts]
    active, misses = list(range(len(drafts))), [0] * len(drafts)
    left = [list(draft) for draft in drafts]
    tried = [draft[: max_new_tokens - 1] for draft in left]
    best, keep = _first_forward(model, embeddings, mask, tried) if drafts else ([], None)
    while active:
        goes_on, accepted, tries = [], [], []
        for place, number in enumerate(active):
            draft, room = tried[place], max_new_tokens - len(answers[number])
            agreed = next((i for i, (a, b) in enumerate(zip(draft, best[place], strict=False)) if a != b), len(draft))
            new = [*draft[:agreed], best[place][agreed]][:room]
            end = next((i for i, token in enumerate(new) if token in ends), None)
            new = new if end is None else new[: end + 1]
            answers[number] += new
            if counts is not None:
                counts.forwards += 1
                counts.tokens += len(new)
                counts.accepted += min(agreed, len(new))
            if end is None and len(new) < room:
                goes_on.append(place)
                accepted.append(agreed)
                misses[number] = 0 if agreed else misses[number] + 1
                left[number] = _rest(left[number][agreed:], new[-1]) if misses[number] < MISSES else []
                most = min(GROWTH * agreed + FEWEST, max_new_tokens - len(answers[number]) - 1)
                tries.append(left[number][:most])
        active, tried = [active[place] for place in goes_on], tries
        if active:
            cache = keep(goes_on, accepted)
            # The last token is written, but not yet in the cache.
            last = torch.tensor([answers[number][-1:] for number in active], device=embeddings.device)
            rows = embed(last).to(embeddings.dtype)
            best, keep = _forward(language_model, cache, rows, torch.ones_like(last, dtype=torch.bool), tried)
    if counts is not None:
        counts.clips += len(drafts)
    return answers


def _rest(draft: list[int], written: int) -> list[int]:
    """How the rest of a draft may go on behind `written`, its own first token or one that stands in its place.

    If the token comes a little later in the draft, what is before it was too much; else it replaced one.
    """
    ahead = draft[: 1 + LOOK_AHEAD]
    return draft[ahead.index(written) + 1 :] if written in ahead else draft[1:]
