"""Packed attention in torch, for any device: utterances are padded to the longest one.

On the CPU torch's flash attention runs, forward and backward. Elsewhere S is computed in fp32, and again in backward,
so that it is not kept in between. This is the torch implementation of `shrink_attention`, with its names and formulas.
"""

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


def padded_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, flash):
    """O [K, H, E] and the log-sum-exp of S [H, K]. `flash` takes torch's flash attention for the CPU."""
    wide, rows = torch.promote_types(query.dtype, torch.float32), query.shape[0]
    if not rows or not key.shape[0]:
        return query.new_zeros(query.shape), query.new_zeros(query.shape[1::-1], dtype=wide)
    q, k, v = (_pad(query, cu_seqlens_q, max_seqlen_q), *(_pad(x, cu_seqlens_k, max_seqlen_k) for x in (key, value)))
    if flash:
        bias = _bias(cu_seqlens_k, max_seqlen_k, q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    else:
        q, k, v = (x.to(wide) for x in (q, k, v))
        scores = torch.matmul(q, k.mT).mul_(scale).add_(_bias(cu_seqlens_k, max_seqlen_k, q.dtype))
        lse = scores.logsumexp(-1)
        out = torch.matmul(scores.sub_(lse[..., None]).exp_(), v).to(query.dtype)
    return _unpad(out, cu_seqlens_q, rows), _unpad(lse[..., None], cu_seqlens_q, rows).squeeze(2).t().contiguous()


def padded_attention_backward(
    dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, flash
):
    """dQ, dK and dV, in the shapes and dtypes of query, key and value."""
    if not query.shape[0] or not key.shape[0]:
        return tuple(x.new_zeros(x.shape) for x in (query, key, value))
    dout, q, out, lse = (_pad(x, cu_seqlens_q, max_seqlen_q) for x in (dout, query, out, lse.t()[..., None]))
    k, v = (_pad(x, cu_seqlens_k, max_seqlen_k) for x in (key, value))
    if flash:
        bias = _bias(cu_seqlens_k, max_seqlen_k, q.dtype)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse.squeeze(3), 0.0, False, attn_mask=bias, scale=scale
        )
    else:
        dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
        p = torch.matmul(q, k.mT).mul_(scale).add_(_bias(cu_seqlens_k, max_seqlen_k, q.dtype)).sub_(lse).exp_()
        dv = torch.matmul(p.mT, dout)
        ds = torch.matmul(dout, v.mT).sub_((dout * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        dq, dk = torch.matmul(ds, k), torch.matmul(ds.mT, q)
    dq = _unpad(dq, cu_seqlens_q, query.shape[0]).to(query.dtype)
    return dq, *(_unpad(x, cu_seqlens_k, key.shape[0]).to(key.dtype) for x in (dk, dv))
