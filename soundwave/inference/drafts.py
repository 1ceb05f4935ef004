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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from soundwave.kernels.vocab_rows import argmax
from soundwave.model.modeling import SoundwaveForConditionalGeneration
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


def _best(head: nn.Module, states: Tensor) -> list[list[int]]:
    """The most probable token after each of `states` [B, n, D]; few logits are held at once."""
    step = max(1, LOGITS // (len(states) * head.weight.shape[0]))
    parts = (head(part) for part in states.split(step, 1))
    return torch.cat([argmax(part.flatten(0, 1)).view(part.shape[:2]) for part in parts], 1).tolist()


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
    language_model, device = model.language_model, embeddings.device
    embed, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    answers: list[list[int]] = [[] for _ in drafts]
    active, misses = list(range(len(drafts))), [0] * len(drafts)
    left = [list(draft) for draft in drafts]
    tried = [draft[: max_new_tokens - 1] for draft in left]
    cache = DynamicCache(config=language_model.config)
    known = embeddings.new_zeros(len(drafts), 0, dtype=torch.int64)  # tokens that are written, but not yet in the cache
    seen = mask.to(torch.int64)
    while active:
        width = max(map(len, tried))
        ids = torch.cat([known, pad(tried, 0, "right")[:, :width].to(device)], 1)
        length = torch.tensor([known.shape[1] + len(draft) for draft in tried], device=device)
        inside = torch.arange(ids.shape[1], device=device) < length[:, None]
        seen = torch.cat([seen, inside.to(torch.int64)], 1)
        rows = embed(ids).to(embeddings.dtype)
        if not cache.get_seq_length():
            rows = torch.cat([embeddings, rows], 1)
        states = language_model.base_model(
            inputs_embeds=rows,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp_(min=0)[:, -rows.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        best = _best(head, states[:, -width - 1 :])
        goes_on, tries, start, longest = [], [], seen.shape[1] - width, 0
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
            seen[place, start + agreed :] = 0  # what was not accepted is never looked at
            if end is None and len(new) < room:
                goes_on.append(place)
                longest = max(longest, agreed)
                misses[number] = 0 if agreed else misses[number] + 1
                left[number] = _rest(left[number][agreed:], new[-1]) if misses[number] < MISSES else []
                most = min(GROWTH * agreed + FEWEST, max_new_tokens - len(answers[number]) - 1)
                tries.append(left[number][:most])
        if longest < width:  # what nobody has accepted leaves the cache
            cache.crop(longest - width)
            seen = seen[:, : start + longest]
        if len(goes_on) < len(active):
            cache.batch_select_indices(torch.tensor(goes_on, dtype=torch.int64, device=device))
            seen = seen[goes_on]
        active, tried = [active[place] for place in goes_on], tries
        known = torch.tensor([answers[number][-1:] for number in active], dtype=torch.int64, device=device)
    if counts is not None:
        counts.clips += len(drafts)
    return answers


def _rest(draft: list[int], written: int) -> list[int]:
    """How the rest of a draft may go on behind `written`, its own first token or one that stands in its place.

    If the token comes a little later in the draft, what is before it was too much; else it replaced one.
    """
    ahead = draft[: 1 + LOOK_AHEAD]
    return draft[ahead.index(written) + 1 :] if written in ahead else draft[1:]
