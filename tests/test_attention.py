"""Attention: its results, which implementation runs and why, and how the implementations are called."""

import inspect
import re
import sys
from functools import partial
from inspect import Parameter, Signature
from itertools import pairwise

import pytest
import torch

from soundwave import attention, doctor
from soundwave.attention import (
    IMPLEMENTATIONS,
    SHORT,
    Shape,
    attend,
    choose_attention,
    flash_attn_4_arguments,
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
# flash_attn.cute.flash_attn_varlen_func of flash-attn-4 4.0.0b36, read from its wheel: names, order and defaults.
FLASH_ATTN_4 = (
    ["q", "k", "v"],
    {
        "qv": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "max_seqlen_q": None,
        "max_seqlen_k": None,
        "min_seqlen_k": None,
        "seqused_q": None,
        "seqused_k": None,
        "gather_kv_indices": None,
        "page_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (None, None),
        "learnable_sink": None,
        "softcap": 0.0,
        "num_splits": 1,
        "pack_gqa": None,
        "deterministic": False,
        "score_mod": None,
        "score_mod_bwd": None,
        "mask_mod": None,
        "block_sparse_tensors": None,
        "aux_tensors": None,
        "aux_scalars": None,
        "return_lse": False,
        "scheduler_metadata": None,
        "seqlen_k_per_split": None,
        "disable_scheduler_metadata": False,
        "gather_bwd_recompute_p": False,
        "gather_bwd_token_chunk": None,
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


def draw(lengths_q, lengths_k, heads=2, size=8, dtype=FP32, device="cpu", seed=0, groups=None):
    """Query, key, value and the four bounds; `groups` heads of keys and values, as many as of queries if not given."""
    generator = torch.Generator().manual_seed(seed)
    rows = ((sum(lengths_q), heads), *[(sum(lengths_k), groups or heads)] * 2)
    tensors = [torch.randn(*n, size, generator=generator).to(device, dtype).requires_grad_() for n in rows]
    cu = [bounds(lengths).to(device) for lengths in (lengths_q, lengths_k)]
    return tensors, (*cu, max(lengths_q, default=0), max(lengths_k, default=0))


def reference(query, key, value, cu_seqlens_q, cu_seqlens_k, *_, causal=False, window=None, scale=None):
    """The definition, for one utterance after another; a query without keys gets 0."""
    parts = [query[:0] + 0 * (key.sum() + value.sum())]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = torch.einsum("qhe,khe->hqk", query[a:b], key[c:d]) * (scale or query.shape[-1] ** -0.5)
        back = torch.arange(b - a)[:, None] - torch.arange(d - c)  # how far a key lies behind its query
        if causal:
            scores = scores.masked_fill(((back < 0) | (back >= (window or b - a))).to(scores.device), -torch.inf)
        parts.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), value[c:d]))
    return torch.cat(parts)


def everything(function, tensors, limits, upstream):
    out = function(*tensors, *limits)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def check(tensors, limits, impl, **shape):
    upstream = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    define = partial(reference, **shape)
    found = everything(partial(attend, impl=impl, **shape), tensors, limits, upstream)
    eager = everything(define, tensors, limits, upstream)
    truth = everything(define, [t.detach().double().requires_grad_() for t in tensors], limits, upstream)
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


SHAPES = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "wide-window": {"causal": True, "window": 1000},
    "scale": {"scale": 0.3},
    "all": {"causal": True, "window": 2, "scale": 0.7},
}


@pytest.fixture(params=["each", "padded"])
def torch_road(request, monkeypatch):
    """The two that `sdpa` stands for: one sequence after another on the CPU, padded rows on other devices."""
    if request.param == "padded":
        monkeypatch.setattr(attention, "_each_sequence", attention._padded)


@pytest.mark.usefixtures("torch_road")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("lengths", [[3, 1, 7], [5], [4, 4], [0, 3, 0], []], ids=str)
def test_causal_windows_and_shared_keys_are_the_definition(lengths, heads, groups, shape):
    check(*draw(lengths, lengths, heads, groups=groups), "sdpa", **shape)


@pytest.mark.usefixtures("torch_road")
def test_in_a_window_of_one_row_each_row_keeps_its_value():
    tensors, limits = draw([3, 1, 7], [3, 1, 7])
    torch.testing.assert_close(attend(*tensors, *limits, causal=True, window=1), tensors[2])


@pytest.mark.parametrize("shape", [{}, SHAPES["causal"], SHAPES["window"]], ids=["full", "causal", "window"])
def test_long_sequences_are_the_definition(shape):
    lengths = [3, SHORT + 1, SHORT]
    check(*draw(lengths, lengths, 4, groups=2), "sdpa", **shape)


@pytest.mark.usefixtures("torch_road")
@pytest.mark.parametrize("shape", [{}, SHAPES["window"]], ids=["full", "window"])
def test_half_types_are_the_definition(shape):
    check(*draw([3, 1, 7], [3, 1, 7], 4, groups=2, dtype=BF16), "sdpa", **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)], ids=["MHA", "GQA"])
def test_on_a_gpu_causal_windows_and_shared_keys_are_the_definition(heads, groups, shape, impl):
    window = shape.get("window")
    try:
        choose_attention(impl, device=CUDA, dtype=BF16, head_size=64, causal=shape.get("causal", False), window=window)
    except ValueError as error:
        pytest.skip(str(error))
    check(*draw([3, 1, 70], [3, 1, 70], heads, 64, BF16, "cuda", groups=groups), impl, **shape)


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
@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS.values(), ids=LENGTHS)
def test_on_a_gpu_every_implementation_is_the_definition(lengths_q, lengths_k, dtype, impl):
    try:
        choose_attention(impl, device=CUDA, dtype=dtype)
    except ValueError as error:
        pytest.skip(str(error))
    check(*draw(lengths_q, lengths_k, dtype=dtype, device="cuda"), impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flash_attn_4", "flash_attn", "varlen"])
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


@pytest.mark.parametrize("impl", ["flash_attn_4", "flash_attn", "varlen"])
def test_what_is_asked_for_and_cannot_run_is_an_error(impl):
    tensors, limits = draw([3], [3], dtype=BF16)
    with pytest.raises(ValueError, match=f"impl = '{impl}', but FlashAttention needs CUDA"):
        attend(*tensors, *limits, impl=impl)


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match="impl = 'flash', but it must be one of auto, flash_attn_4, flash_attn, varlen, sdpa"
    ):
        choose_attention("flash", device=CPU, dtype=FP32)


@pytest.mark.gpu
def test_on_a_gpu_half_precision_takes_flash_attention_and_the_rest_says_why_not():
    assert choose_attention(device=CUDA, dtype=BF16).name in ("flash_attn_4", "flash_attn", "varlen")
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


def test_the_call_fits_the_signature_of_flash_attn_4():
    (query, key, value), limits = draw([3, 1], [2, 5])
    bound = signature_of(FLASH_ATTN_4).bind(**flash_attn_4_arguments(query, key, value, *limits))
    bound.apply_defaults()
    given = bound.arguments
    assert (given["q"] is query) and (given["k"] is key) and (given["v"] is value) and given["qv"] is None
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (3, 5)
    for name, wanted in (("cu_seqlens_q", [0, 3, 4]), ("cu_seqlens_k", [0, 2, 7])):
        assert given[name].dtype == torch.int32 and given[name].tolist() == wanted
    assert (given["softmax_scale"], given["causal"], given["window_size"]) == (None, False, (None, None))
    assert given["return_lse"] is False and given["learnable_sink"] is None


@pytest.mark.parametrize(
    ("shape", "old", "new"),
    [
        (Shape(causal=True), (-1, 0), (None, 0)),
        (Shape(causal=True, window=3), (2, 0), (2, 0)),
        (Shape(), (-1, -1), (None, None)),
    ],
    ids=["causal", "window", "full"],
)
def test_a_window_counts_the_row_itself(shape, old, new):
    """FlashAttention counts the rows before it."""
    arguments = (*draw([3], [3])[0], *draw([3], [3])[1])
    for call, window in ((flash_attn_arguments, old), (flash_attn_4_arguments, new)):
        given = call(*arguments, shape)
        assert (given["causal"], given["window_size"]) == (shape.causal, window)
    given = varlen_attn_arguments(*arguments, shape, known=frozenset({"window_size"}))
    assert given.get("window_size", (-1, -1)) == old


def test_what_an_older_torch_lacks_is_done_before_the_call():
    tensors, limits = draw([3], [3], heads=4, groups=2)
    shape = Shape(causal=True, scale=0.5)
    given = varlen_attn_arguments(*tensors, *limits, shape, known=frozenset({"is_causal"}))
    assert given["is_causal"] is True and given["key"].shape == given["query"].shape
    torch.testing.assert_close(given["query"], tensors[0] * 0.5 * 8**0.5)
    given = varlen_attn_arguments(*tensors, *limits, shape, known=frozenset({"window_size", "scale", "enable_gqa"}))
    assert given["enable_gqa"] is True and given["scale"] == 0.5 and given["query"] is tensors[0]


@pytest.mark.parametrize("call", [flash_attn_arguments, flash_attn_4_arguments], ids=["flash_attn", "flash_attn_4"])
def test_flash_attn_is_deterministic_where_torch_is(call):
    tensors, limits = draw([3], [3])
    assert call(*tensors, *limits)["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    try:
        assert call(*tensors, *limits)["deterministic"] is True
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Set the compute capability and what is installed: names of packages -> their function or None."""

    def there(capability: tuple[int, int], *installed: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for name, known_as in (("_flash_attn_4", "flash-attn-4"), ("_flash_attn", "flash-attn")):
            found = (print, "") if known_as in installed else (None, f"{known_as} is not installed")
            monkeypatch.setattr(attention, name, lambda found=found: found)

    return there


def test_flash_attn_4_is_taken_where_it_can_train(on_a_gpu):
    on_a_gpu((9, 0), "flash-attn-4", "flash-attn")
    chosen = choose_attention(device=CUDA, dtype=BF16)
    assert chosen == ("flash_attn_4", "flash-attn-4 is installed and takes such tensors")
    assert choose_attention(device=CUDA, dtype=BF16, head_size=256).name == "flash_attn_4"


@pytest.mark.parametrize(
    ("capability", "head_size", "reason"),
    [
        ((8, 6), 128, "flash-attn-4 has a backward pass for compute capability 9.0 to 12.x, and cuda has 8.6"),
        ((10, 0), 192, "flash-attn-4 takes heads of up to 128 in steps of 8 here, and these have 192"),
        ((9, 0), 100, "flash-attn-4 takes heads of up to 256 in steps of 8 here, and these have 100"),
    ],
    ids=["sm_86", "sm_100", "odd"],
)
def test_flash_attn_stands_in_for_flash_attn_4(on_a_gpu, capability, head_size, reason):
    on_a_gpu(capability, "flash-attn-4", "flash-attn")
    chosen = choose_attention(device=CUDA, dtype=BF16, head_size=head_size)
    assert chosen == ("flash_attn", f"flash-attn is installed and takes such tensors; {reason}")
    with pytest.raises(ValueError, match=re.escape(f"impl = 'flash_attn_4', but {reason}")):
        choose_attention("flash_attn_4", device=CUDA, dtype=BF16, head_size=head_size)


@pytest.fixture
def only_flash_attn_4(tmp_path, monkeypatch):
    """The folder of its wheel: `flash_attn`, which is no module itself, with `cute` in it."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_varlen_func(): ...\n")
    names = [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("only_flash_attn_4")
def test_flash_attn_4_alone_is_not_taken_for_flash_attn():
    found, reason = attention._imported("flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4")
    assert callable(found) and not reason
    found, reason = attention._imported("flash_attn", "flash_attn_varlen_func", "flash-attn")
    assert found is None and reason == "flash-attn is not installed"


def test_a_tuple_is_the_output_and_more(monkeypatch):
    """flash-attn-4 returns the log-sum-exp as well."""
    tensors, limits = draw([3], [3])
    monkeypatch.setattr(attention, "choose_attention", lambda *_, **__: attention.Attention("flash_attn_4", ""))
    monkeypatch.setattr(attention, "_flash_attn_4", lambda: (lambda **given: (given["q"], None), ""))
    assert attend(*tensors, *limits) is tensors[0]


@pytest.mark.parametrize(
    ("module", "recorded", "call"),
    [("flash_attn", FLASH_ATTN, flash_attn_arguments), ("flash_attn.cute", FLASH_ATTN_4, flash_attn_4_arguments)],
    ids=["flash_attn", "flash_attn_4"],
)
def test_the_recorded_signature_is_the_installed_ones(module, recorded, call):
    found = inspect.signature(pytest.importorskip(module).flash_attn_varlen_func).parameters
    names, defaults = recorded
    used = call(*draw([1], [1])[0], *draw([1], [1])[1])
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
        ({1: torch.zeros(4, 3, 8)}, r"key has \[3, 8\] heads and head size, but query has \[2, 8\]"),
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
        "other-heads",
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "window = 3, but it must be at least 1, and needs causal = True"),
        ({"causal": True, "window": 0}, "window = 0, but it must be at least 1"),
        ({"causal": True}, "causal = True, but queries and keys have bounds of their own"),
    ],
    ids=["window-alone", "no-window", "other-bounds"],
)
def test_attention_that_is_not_there_is_refused(settings, message):
    (query, key, value), limits = draw([4], [4] if "window" in settings else [5])
    with pytest.raises(ValueError, match=message):
        attend(query, key, value, *limits, **settings)
