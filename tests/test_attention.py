"""Attention: its results, which implementation runs and why, and how the implementations are called."""

import inspect
from inspect import Parameter, Signature
from itertools import pairwise

import pytest
import torch

from soundwave import doctor
from soundwave.attention import (
    IMPLEMENTATIONS,
    attend,
    choose_attention,
    flash_attn_arguments,
    varlen_attn_arguments,
)
from tests.accuracy import assert_as_accurate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("out", "dquery", "dkey", "dvalue")

# flash_attn_varlen_func of flash-attn 2.8.3.post2, read from its source distribution: names, order and defaults.
FLASH_ATTN = (
    ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"],
    {
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
        "return_attn_probs": False,
        "block_table": None,
    },
)
# varlen_attn of torch 2.10, from its documentation; the signature of the installed one is inspected.
VARLEN_ATTN_2_10 = (
    ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"],
    {"is_causal": False, "return_aux": None},
)

LENGTHS = {
    "mixture": ([3, 1, 7], [3, 1, 7]),
    "one-clip": ([5], [5]),
    "equal": ([4, 4], [4, 4]),
    "cross": ([3, 1, 2], [2, 63, 1]),
    "empty-utterance": ([0, 3, 0], [0, 3, 0]),
    "no-queries": ([0, 3], [2, 3]),
    "no-keys": ([2, 3], [0, 3]),
    "no-keys-at-all": ([2, 1], [0, 0]),
    "nothing": ([0, 0], [0, 0]),
    "no-utterances": ([], []),
}


def signature_of(recorded: tuple[list[str], dict]) -> Signature:
    names, defaults = recorded
    given = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    return Signature(
        given + [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=d) for name, d in defaults.items()]
    )


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(lengths_q, lengths_k, heads=2, size=8, dtype=FP32, device="cpu", seed=0):
    """Query, key, value and the four bounds."""
    generator = torch.Generator().manual_seed(seed)
    rows = (sum(lengths_q), sum(lengths_k), sum(lengths_k))
    tensors = [torch.randn(n, heads, size, generator=generator).to(device, dtype).requires_grad_() for n in rows]
    cu = [bounds(lengths).to(device) for lengths in (lengths_q, lengths_k)]
    return tensors, (*cu, max(lengths_q, default=0), max(lengths_k, default=0))


def reference(query, key, value, cu_seqlens_q, cu_seqlens_k, *_):
    """The definition, for one utterance after another; a query without keys gets 0."""
    parts = [query[:0] + 0 * (key.sum() + value.sum())]
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = torch.einsum("qhe,khe->hqk", query[a:b], key[c:d]) * query.shape[-1] ** -0.5
        parts.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), value[c:d]))
    return torch.cat(parts)


def everything(function, tensors, limits, upstream):
    out = function(*tensors, *limits)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def check(tensors, limits, impl):
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    found = everything(lambda *a: attend(*a, impl=impl), tensors, limits, upstream)
    eager = everything(reference, tensors, limits, upstream)
    truth = everything(reference, [t.detach().double().requires_grad_() for t in tensors], limits, upstream)
    for name, a, b, c in zip(NAMES, found, eager, truth, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, a.dtype, name)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS.values(), ids=LENGTHS)
def test_sdpa_is_the_definition(lengths_q, lengths_k, dtype):
    check(*draw(lengths_q, lengths_k, dtype=dtype), "sdpa")


@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 7), (9, 64)], ids=["H1-E1", "H3-E7", "H9-E64"])
def test_odd_heads(heads, size):
    check(*draw([63, 1, 100], [63, 1, 100], heads, size), "sdpa")


def test_strided_heads_of_one_projection_are_read_right():
    tensors, limits = draw([3, 5], [3, 5])
    packed = torch.stack(tensors, 1).detach()
    assert torch.equal(attend(*packed.unbind(1), *limits), attend(*tensors, *limits))


def test_neighbours_do_not_matter():
    (query, key, value), limits = draw([3, 5, 2], [3, 5, 2])
    out = attend(query, key, value, *limits)
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[3:8] = torch.nan
    spoilt = attend(query, key, value, *limits)
    assert torch.equal(spoilt[:3], out[:3]) and torch.equal(spoilt[8:], out[8:])
    assert spoilt[3:8].isnan().all()


def test_results_are_bitwise_the_same_every_time():
    tensors, limits = draw([3, 63, 7], [3, 63, 7])
    upstream = torch.randn(tensors[0].shape)
    first = everything(attend, tensors, limits, upstream)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(everything(attend, tensors, limits, upstream), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS.values(), ids=LENGTHS)
def test_on_a_gpu_every_implementation_is_the_definition(lengths_q, lengths_k, dtype, impl):
    try:
        choose_attention(impl, device=CUDA, dtype=dtype)
    except ValueError as error:
        pytest.skip(str(error))
    check(*draw(lengths_q, lengths_k, dtype=dtype, device="cuda"), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flash_attn", "varlen"])
def test_on_a_gpu_backward_is_deterministic_where_torch_is_told_so(impl):
    try:
        choose_attention(impl, device=CUDA, dtype=BF16)
    except ValueError as error:
        pytest.skip(str(error))
    tensors, limits = draw([700, 300, 10], [700, 300, 10], 8, 128, BF16, "cuda")
    upstream = torch.randn(tensors[0].shape, device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, *others = (everything(lambda *a: attend(*a, impl=impl), tensors, limits, upstream) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------- which one, and why


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_on_the_cpu_it_is_sdpa_and_the_reason_says_so(dtype):
    assert choose_attention(device=CPU, dtype=dtype) == (
        "sdpa",
        "FlashAttention needs CUDA, and the tensors are on cpu",
    )


@pytest.mark.parametrize("impl", ["flash_attn", "varlen"])
def test_what_is_asked_for_and_cannot_run_is_an_error(impl):
    tensors, limits = draw([3], [3], dtype=BF16)
    with pytest.raises(ValueError, match=f"impl = '{impl}', but FlashAttention needs CUDA"):
        attend(*tensors, *limits, impl=impl)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="impl = 'flash', but it must be one of auto, flash_attn, varlen, sdpa"):
        choose_attention("flash", device=CPU, dtype=FP32)


@pytest.mark.gpu
def test_on_a_gpu_half_precision_takes_flash_attention_and_the_rest_says_why_not():
    assert choose_attention(device=CUDA, dtype=BF16).name in ("flash_attn", "varlen")
    assert choose_attention(device=CUDA, dtype=FP32) == (
        "sdpa",
        "FlashAttention takes float16 and bfloat16, and the tensors are float32",
    )
    too_large = choose_attention(device=CUDA, dtype=BF16, head_size=264)
    assert too_large == ("sdpa", "FlashAttention takes heads of up to 256, and these have 264")
    with pytest.raises(ValueError, match="takes multiples of 8, and the head size is 100"):
        choose_attention("varlen", device=CUDA, dtype=BF16, head_size=100)


def test_doctor_prints_the_choice():
    rows = {what: (value, why) for what, value, why in doctor.findings()}
    value, why = rows["attention"]
    assert value in IMPLEMENTATIONS[1:] and why


# ---------------------------------------------------------------- how the others are called


def test_the_call_fits_the_signature_of_flash_attn():
    (query, key, value), limits = draw([3, 1], [2, 5])
    signature = signature_of(FLASH_ATTN)
    bound = signature.bind(**flash_attn_arguments(query, key, value, *limits))
    bound.apply_defaults()
    given = bound.arguments
    assert (given["q"] is query) and (given["k"] is key) and (given["v"] is value)
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (3, 5)
    for name, wanted in (("cu_seqlens_q", [0, 3, 4]), ("cu_seqlens_k", [0, 2, 7])):
        assert given[name].dtype == torch.int32 and given[name].tolist() == wanted
    # Full attention without dropout, scaled by 1/sqrt(head size), which returns only the output.
    assert (given["dropout_p"], given["softmax_scale"], given["causal"], given["softcap"]) == (0.0, None, False, 0.0)
    assert given["window_size"] == (-1, -1) and given["return_attn_probs"] is False


def test_flash_attn_is_deterministic_where_torch_is():
    tensors, limits = draw([3], [3])
    assert flash_attn_arguments(*tensors, *limits)["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    try:
        assert flash_attn_arguments(*tensors, *limits)["deterministic"] is True
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_recorded_signature_is_the_installed_ones():
    flash_attn = pytest.importorskip("flash_attn")
    found = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    names, defaults = FLASH_ATTN
    used = flash_attn_arguments(*draw([1], [1])[0], *draw([1], [1])[1])
    assert list(found)[: len(names)] == names
    assert set(used) <= set(found)
    assert {name: found[name].default for name in defaults if name in found}.items() <= defaults.items()


@pytest.mark.parametrize("version", ["installed", "2.10"])
def test_the_call_fits_the_signature_of_torchs_own(version):
    (query, key, value), limits = draw([3, 1], [2, 5])
    if version == "installed":
        varlen = pytest.importorskip("torch.nn.attention.varlen")
        signature = inspect.signature(varlen.varlen_attn)
    else:
        signature = signature_of(VARLEN_ATTN_2_10)
    bound = signature.bind(**varlen_attn_arguments(query, key, value, *limits))
    bound.apply_defaults()
    given = bound.arguments
    assert (given["query"] is query) and (given["key"] is key) and (given["value"] is value)
    assert (given["max_q"], given["max_k"]) == (3, 5)
    for name, wanted in (("cu_seq_q", [0, 3, 4]), ("cu_seq_k", [0, 2, 7])):
        assert given[name].dtype == torch.int32 and given[name].tolist() == wanted
    assert given["return_aux"] is None and not given.get("is_causal")
    assert given.get("scale") is None and given.get("window_size", (-1, -1)) == (-1, -1)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 16)}, r"query has shape \[4, 16\], but it must be \[rows, heads, head size\]"),
        ({1: torch.zeros(4, 2, 8, dtype=FP64)}, "key is torch.float64 on cpu, but query is torch.float32"),
        ({2: torch.zeros(4, 2, 4)}, r"value has \[2, 4\] heads and head size, but query has \[2, 8\]"),
        ({2: torch.zeros(3, 2, 8)}, "value has 3 rows, but key has 4"),
        ({3: torch.zeros(0)}, r"cu_seqlens_q has shape \[0\]"),
        ({4: torch.tensor([0, 2, 4])}, r"cu_seqlens_k has shape \[3\]"),
        ({3: torch.tensor([0, 3])}, r"cu_seqlens_q = \[0, 3\], but it must rise from 0 to 4, the packed rows"),
        ({4: torch.tensor([1, 4])}, r"cu_seqlens_k = \[1, 4\], but it must rise from 0 to 4"),
        ({3: torch.tensor([0, 6, 4]), 4: torch.tensor([0, 2, 4])}, r"cu_seqlens_q = \[0, 6, 4\], but it must rise"),
        (  # 4 rows are 2 utterances of 2, but not these 2
            {3: torch.tensor([0, 1, 4]), 4: torch.tensor([0, 1, 4]), 5: 2, 6: 3},
            "max_seqlen_q = 2, but an utterance has 3 rows",
        ),
        ({6: 3}, "max_seqlen_k = 3, but an utterance has 4 rows"),
    ],
    ids=[
        "rank",
        "dtype",
        "heads",
        "rows",
        "no-bounds",
        "other-bounds",
        "bounds-end-early",
        "bounds-begin-late",
        "bounds-fall",
        "longest-query",
        "longest-key",
    ],
)
def test_bad_input_is_named(change, message):
    tensors, limits = draw([4], [4])
    arguments = dict(enumerate((*tensors, *limits))) | change
    with pytest.raises(ValueError, match=message):
        attend(*arguments.values())
