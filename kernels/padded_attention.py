"""Packed attention in torch: the torch implementation of `shrink_attention`, with its names and formulas.

On the CPU torch's flash attention runs on each utterance's rows in place, forward and backward: one call for all of
them where they are equally long. Elsewhere, where every call would be a launch, utterances are padded to the longest
one; S is computed in fp32, and again in backward, so that it is not kept in between.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def _places(cu_seqlens: Tensor, longest: int) -> Tensor:
    """int64 [K]: for each packed row the number of its row in the padded form."""
    mask = torch.arange(longest, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
    return mask.flatten().nonzero().squeeze(1)


def _pad(rows: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Packed [K, H, E] -> [B, H, longest, E], 0 past an utterance's rows; a view if all are equally long."""
    slots = (cu_seqlens.numel() - 1) * longest
    if rows.shape[0] != slots:
        rows = rows.new_zeros(slots, *rows.shape[1:]).index_copy_(0, _places(cu_seqlens, longest), rows)
    return rows.reshape(-1, longest, *rows.shape[1:]).transpose(1, 2)


def _unpad(padded: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """[B, H, longest, E] -> packed [K, H, E]."""
    packed = padded.transpose(1, 2).flatten(0, 1)
    return (packed if packed.shape[0] == rows else packed[_places(cu_seqlens, padded.shape[2])]).contiguous()


def _bias(cu_seqlens: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, longest]: -inf at padded keys; 0 for an utterance without keys, whose padded values are 0 as well."""
    sizes = cu_seqlens.diff()[:, None]
    missing = (torch.arange(longest, device=sizes.device) >= sizes) & (sizes > 0)
    return torch.zeros(missing.shape, dtype=dtype, device=sizes.device).masked_fill_(missing, -torch.inf)[:, None, None]


def _utterances(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """The rows of q and those of k and v that one call takes, and the number of utterances among them.

    Utterances without queries or keys are left out.
    """
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    sizes = [(q[b + 1] - q[b], k[b + 1] - k[b]) for b in range(len(q) - 1)]
    if sizes and all(sizes[0]) and sizes.count(sizes[0]) == len(sizes):
        yield slice(q[0], q[-1]), slice(k[0], k[-1]), len(sizes)
        return
    for b, size in enumerate(sizes):
        if all(size):
            yield slice(q[b], q[b + 1]), slice(k[b], k[b + 1]), 1


def _batch(rows: Tensor, place: slice, utterances: int) -> Tensor:
    """Packed [K, H, E] -> [utterances, H, longest, E], a view."""
    return rows[place].unflatten(0, (utterances, -1)).transpose(1, 2)


def _mask(key: Tensor) -> Tensor:
    """A mask of zeros, which masks nothing. Without any, torch's kernel makes 0 of rows whose scores are NaN."""
    return key.new_zeros(1, 1, 1, key.shape[2])


def _put(total: Tensor | None, place: slice, part: Tensor, like: Tensor) -> Tensor:
    """`part` [utterances, H, longest, ...], packed; if there are more rows than its own, in its place in `total`."""
    part = part.transpose(1, 2).flatten(0, 1)
    if total is None and len(part) == len(like):
        return part
    total = part.new_zeros(len(like), *part.shape[1:]) if total is None else total
    total[place] = part
    return total


def flash_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
    """O [K, H, E] and the log-sum-exp of S [H, K], on the CPU; 0 where there are no keys."""
    out = lse = None
    for of_q, of_k, count in _utterances(cu_seqlens_q, cu_seqlens_k):
        q, k, v = _batch(query, of_q, count), _batch(key, of_k, count), _batch(value, of_k, count)
        o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_mask(k), scale=scale)
        out, lse = _put(out, of_q, o, query), _put(lse, of_q, sums, query)
    if out is None:
        out = query.new_zeros(query.shape)
        lse = query.new_zeros(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    return out.contiguous(), lse.t().contiguous()


def flash_attention_backward(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, scale):
    """dQ, dK and dV on the CPU."""
    totals, lse = [None, None, None], lse.t()[..., None]
    for of_q, of_k, count in _utterances(cu_seqlens_q, cu_seqlens_k):
        given = [_batch(x, of_q, count) for x in (dout, query)]
        given += [_batch(x, of_k, count) for x in (key, value)]
        given += [_batch(out, of_q, count), _batch(lse, of_q, count).squeeze(3)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, 0.0, False, attn_mask=_mask(given[2]), scale=scale
        )  # fmt: skip
        places, tensors = (of_q, of_k, of_k), (query, key, value)
        totals = [_put(*each) for each in zip(totals, places, found, tensors, strict=True)]
    return tuple(
        x.new_zeros(x.shape) if total is None else total.contiguous()
        for total, x in zip(totals, (query, key, value), strict=True)
    )


def padded_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale):
    """O [K, H, E] and the log-sum-exp of S [H, K], on any device; 0 where there are no keys."""
    wide, rows = torch.promote_types(query.dtype, torch.float32), query.shape[0]
    if not rows or not key.shape[0]:
        return query.new_zeros(query.shape), query.new_zeros(query.shape[1::-1], dtype=wide)
    q, k, v = (_pad(query, cu_seqlens_q, max_seqlen_q), *(_pad(x, cu_seqlens_k, max_seqlen_k) for x in (key, value)))
    q, k, v = (x.to(wide) for x in (q, k, v))
    scores = torch.matmul(q, k.mT).mul_(scale).add_(_bias(cu_seqlens_k, max_seqlen_k, q.dtype))
    lse = scores.logsumexp(-1)
    out = torch.matmul(scores.sub_(lse[..., None]).exp_(), v).to(query.dtype)
    lse = lse.masked_fill((cu_seqlens_k.diff() == 0)[:, None, None], 0.0)
    return _unpad(out, cu_seqlens_q, rows), _unpad(lse[..., None], cu_seqlens_q, rows).squeeze(2).t().contiguous()


def padded_attention_backward(
    dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale
):
    """dQ, dK and dV, in the shapes and dtypes of query, key and value."""
    if not query.shape[0] or not key.shape[0]:
        return tuple(x.new_zeros(x.shape) for x in (query, key, value))
    dout, q, out, lse = (_pad(x, cu_seqlens_q, max_seqlen_q) for x in (dout, query, out, lse.t()[..., None]))
    k, v = (_pad(x, cu_seqlens_k, max_seqlen_k) for x in (key, value))
    dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    p = torch.matmul(q, k.mT).mul_(scale).add_(_bias(cu_seqlens_k, max_seqlen_k, q.dtype)).sub_(lse).exp_()
    dv = torch.matmul(p.mT, dout)
    ds = torch.matmul(dout, v.mT).sub_((dout * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    dq, dk = torch.matmul(ds, k), torch.matmul(ds.mT, q)
    dq = _unpad(dq, cu_seqlens_q, query.shape[0]).to(query.dtype)
    return dq, *(_unpad(x, cu_seqlens_k, key.shape[0]).to(key.dtype) for x in (dk, dv))
