"""Splice: values and gradients are bitwise those of `eager.splice`, with torch and with Triton."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soundwave import eager
from soundwave.fused.functional import Spliced, splice
from soundwave.kernels.splice import _config, _forward, _places, splice_places, splice_rows, splice_rows_ref
from tests.implementations import WHERE, skip_unless_runnable

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

AUDIO, PAD = 99, 0
FP32, BF16 = torch.float32, torch.bfloat16


def draw(
    batch, width, columns, longest, *, audio=0.6, padded="right", text=FP32, speech=FP32, device="cpu", seed=0
) -> dict:
    """Arguments of `splice`: rows of 1 to `width` tokens, each with a recording at the rate `audio`."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    input_ids, tokens = whole(1, 50, batch, width), whole(1, width + 1, batch)
    attention_mask = torch.arange(width) < tokens[:, None]
    if padded == "left":
        attention_mask = attention_mask.flip(1)
    has_audio = torch.rand(batch, generator=generator) < audio
    for row in has_audio.nonzero().flatten():
        places = attention_mask[row].nonzero().flatten()
        input_ids[row, places[whole(0, len(places), 1)]] = AUDIO
    counts = whole(0, longest + 1, int(has_audio.sum()))
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    arguments = {
        "embeddings": torch.randn(batch, width, columns, generator=generator).to(text),
        "input_ids": input_ids.masked_fill(~attention_mask, PAD),
        "attention_mask": attention_mask.to(torch.int64),
        "speech": torch.randn(int(counts.sum()), columns, generator=generator).to(speech),
        "cu_seqlens": cu_seqlens,
        "labels": whole(0, 50, batch, width),
    }
    arguments = {name: value.to(device) for name, value in arguments.items()}
    for name in ("embeddings", "speech"):
        arguments[name].requires_grad_()
    return arguments | {"audio_placeholder_id": AUDIO}


def check(arguments, padding_side, impl):
    """Values and gradients are eager's, bit for bit."""
    found = splice(**arguments, padding_side=padding_side, impl=impl)
    expected = eager.splice(**arguments, padding_side=padding_side)
    for name, a, b in zip(Spliced._fields, found, expected, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    inputs = (arguments["embeddings"], arguments["speech"])
    upstream = torch.randn(found.embeddings.shape).to(found.embeddings)
    gradients = [torch.autograd.grad(out[0], inputs, upstream) for out in (found, expected)]
    for name, a, b in zip(("dembeddings", "dspeech"), *gradients, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


# ---------------------------------------------------------------- as eager


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("padded", ["right", "left"], ids=["text-padded-right", "text-padded-left"])
@pytest.mark.parametrize(
    ("batch", "width", "columns", "longest", "audio"),
    [(1, 1, 1, 1, 1), (1, 1, 7, 3, 0), (3, 7, 63, 4, 0.6), (5, 10, 100, 7, 1), (2, 3, 4, 0, 1), (4, 5, 3, 2, 0)],
    ids=["one-token", "one-text", "mixed", "all-audio", "no-frames-kept", "text-only"],
)
def test_everything_is_eagers(batch, width, columns, longest, audio, padded, padding_side, device, impl):
    skip_unless_runnable(device, impl)
    check(draw(batch, width, columns, longest, audio=audio, padded=padded, device=device), padding_side, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(("text", "speech"), [(FP32, BF16), (BF16, FP32), (BF16, BF16)], ids=str)
def test_speech_takes_the_dtype_of_the_text_and_its_gradient_its_own(text, speech, padding_side, device, impl):
    skip_unless_runnable(device, impl, text, speech)
    check(draw(3, 7, 33, 4, text=text, speech=speech, device=device), padding_side, impl)


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_rows_wider_than_a_block(device, impl):
    skip_unless_runnable(device, impl)
    check(draw(2, 3, 2500, 2, audio=1, device=device), "right", impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 9),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["right", "left"]),
    st.integers(0, 2**20),
)
def test_drawn_batches(impl, batch, width, longest, padded, padding_side, seed):
    skip_unless_runnable("cpu", impl)
    check(draw(batch, width, 3, longest, padded=padded, seed=seed), padding_side, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_at_the_size_of_the_language_model(padding_side):
    check(draw(8, 100, 4096, 300, text=BF16, speech=BF16, device="cuda"), padding_side, "triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_copy_is_its_definition(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(5, 9, 7, 4)
    embeddings, speech = arguments["embeddings"].flatten(0, 1), arguments["speech"]
    source, inverse = splice_places(
        arguments["input_ids"],
        arguments["attention_mask"],
        arguments["cu_seqlens"],
        speech.shape[0],
        placeholder=AUDIO,
        left=True,
    )
    out = splice_rows(embeddings, speech, source.flatten(), inverse, impl)
    assert torch.equal(out, splice_rows_ref(embeddings, speech, source.flatten()))
    # The map read backwards: every row that was taken names the place that took it.
    taken = (inverse >= 0).nonzero().flatten()
    assert torch.equal(source.flatten()[inverse[taken]], taken) and len(taken) == int((source >= 0).sum())


# ---------------------------------------------------------------- single behaviours


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_example_by_hand(impl):
    skip_unless_runnable("cpu", impl)
    input_ids = torch.tensor([[5, AUDIO, 7], [PAD, 8, 9]])
    arguments = {
        "embeddings": torch.tensor([[5.0, -1.0, 7.0], [-1.0, 8.0, 9.0]])[..., None],
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "speech": torch.tensor([[0.1], [0.2]]),
        "cu_seqlens": torch.tensor([0, 2]),
        "labels": input_ids,
        "audio_placeholder_id": AUDIO,
        "impl": impl,
    }
    right, left = splice(**arguments), splice(**arguments, padding_side="left")
    torch.testing.assert_close(right.embeddings[..., 0], torch.tensor([[5.0, 0.1, 0.2, 7.0], [8.0, 9.0, 0.0, 0.0]]))
    torch.testing.assert_close(left.embeddings[..., 0], torch.tensor([[5.0, 0.1, 0.2, 7.0], [0.0, 0.0, 8.0, 9.0]]))
    assert right.labels.tolist() == [[5, -100, -100, 7], [8, 9, -100, -100]]
    assert left.labels.tolist() == [[5, -100, -100, 7], [-100, -100, 8, 9]]
    assert right.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert right.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert left.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_it_unpacks_as_eagers_three_results():
    arguments = draw(3, 7, 3, 4)
    embeddings, mask, labels = splice(**arguments)
    assert embeddings.shape[:2] == mask.shape == labels.shape


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_clip_gives_what_it_gives_in_a_batch(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(5, 9, 7, 4, audio=1)
    together = splice(**arguments, impl=impl)
    for row, (start, stop) in enumerate(pairwise(arguments["cu_seqlens"].tolist())):
        alone = {name: arguments[name][row : row + 1] for name in ("embeddings", "input_ids", "attention_mask")}
        out = splice(
            **alone,
            speech=arguments["speech"][start:stop],
            cu_seqlens=torch.tensor([0, stop - start]),
            audio_placeholder_id=AUDIO,
            impl=impl,
        )
        assert torch.equal(out.embeddings[0], together.embeddings[row, : out.embeddings.shape[1]])
        assert not together.embeddings[row, out.embeddings.shape[1] :].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_where_nothing_is_taken_from_reaches_neither_result_nor_gradient(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(3, 7, 5, 4, audio=1)
    clean = splice(**arguments, impl=impl)
    unused = (arguments["attention_mask"] == 0) | (arguments["input_ids"] == AUDIO)
    with torch.no_grad():
        arguments["embeddings"][unused] = torch.nan
    spoilt = splice(**arguments, impl=impl)
    assert torch.equal(spoilt.embeddings, clean.embeddings)
    (gradient,) = torch.autograd.grad(spoilt.embeddings.square().sum(), arguments["embeddings"])
    assert not gradient[unused].any() and gradient[~unused].all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["embeddings", "speech"])
def test_a_single_gradient_is_the_one_of_both_together(wanted, impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(3, 7, 5, 4, audio=1)
    expected = torch.autograd.grad(splice(**arguments, impl=impl)[0].square().sum(), arguments[wanted])
    other = {"embeddings": "speech", "speech": "embeddings"}[wanted]
    arguments[other].requires_grad_(False)
    found = torch.autograd.grad(splice(**arguments, impl=impl)[0].square().sum(), arguments[wanted])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_rows_and_no_tokens(impl):
    skip_unless_runnable("cpu", impl)
    for batch, width in ((0, 5), (3, 0), (0, 0)):
        empty = {
            "embeddings": torch.zeros(batch, width, 4),
            "input_ids": torch.zeros(batch, width, dtype=torch.int64),
            "attention_mask": torch.zeros(batch, width, dtype=torch.int64),
            "speech": torch.zeros(0, 4),
            "cu_seqlens": torch.zeros(1, dtype=torch.int64),
            "audio_placeholder_id": AUDIO,
            "impl": impl,
        }
        out = splice(**empty, labels=empty["input_ids"])
        assert out.embeddings.shape == (batch, 0, 4)
        assert out.attention_mask.shape == out.labels.shape == out.position_ids.shape == (batch, 0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_other_integers_and_strides_are_read_right(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(3, 7, 6, 4, audio=1)
    expected = splice(**arguments, impl=impl)
    arguments["embeddings"] = arguments["embeddings"].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    arguments["speech"] = arguments["speech"].detach().repeat_interleave(2, 1)[:, ::2]
    arguments["input_ids"] = arguments["input_ids"].to(torch.int32)
    arguments["attention_mask"] = arguments["attention_mask"].bool()
    arguments["cu_seqlens"] = arguments["cu_seqlens"].to(torch.int64)
    found = splice(**arguments, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("device", "impl"), WHERE)
def test_results_are_bitwise_the_same_every_time(device, impl):
    skip_unless_runnable(device, impl)
    arguments = draw(5, 9, 33, 7, audio=1, device=device)
    inputs = arguments["embeddings"], arguments["speech"]

    def run():
        out = splice(**arguments, impl=impl)
        return [*out, *torch.autograd.grad(out.embeddings.square().sum(), inputs)]

    first = run()
    for _ in range(20 if impl == "torch" or device == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


# ---------------------------------------------------------------- torch.library and torch.compile


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_opcheck_of_the_places(left):
    arguments = draw(3, 7, 5, 4)
    places = [arguments[name] for name in ("input_ids", "attention_mask", "cu_seqlens")]
    torch.library.opcheck(_places, (*places, arguments["speech"].shape[0], AUDIO, left))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_of_the_rows(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(3, 7, 5, 4)
    places = [arguments[name] for name in ("input_ids", "attention_mask", "cu_seqlens")]
    source, inverse = _places(*places, arguments["speech"].shape[0], AUDIO, False)
    rows = arguments["embeddings"].detach().flatten(0, 1).requires_grad_()
    torch.library.opcheck(_forward, (rows, arguments["speech"], source.flatten(), inverse, impl))


# A compiler cannot look into Triton's settings, as it would have to where the interpreter is asked for by name.
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_as_one_graph(device):

    def function(embeddings, input_ids, attention_mask, speech, cu_seqlens, labels):
        return splice(
            embeddings,
            input_ids,
            attention_mask,
            speech,
            cu_seqlens,
            audio_placeholder_id=AUDIO,
            labels=labels,
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        arguments = draw(3, 7, 5, 4, audio=1, seed=seed, device=device)
        del arguments["audio_placeholder_id"]
        inputs = arguments["embeddings"], arguments["speech"]
        found, expected = compiled(**arguments), function(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        gradients = [torch.autograd.grad(out[0].square().sum(), inputs) for out in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_second_derivative_is_refused(impl):
    skip_unless_runnable("cpu", impl)
    arguments = draw(3, 7, 5, 4, audio=1)
    out = splice(**arguments, impl=impl).embeddings
    (gradient,) = torch.autograd.grad(out.square().sum(), arguments["speech"], create_graph=True)
    with pytest.raises(RuntimeError, match="splice has no second derivative"):
        gradient.sum().backward()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids has shape \[3\], but it must be \[B, L\]"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids is torch.float32, but it must be int32 or int64"),
        ({"embeddings": torch.zeros(2, 4, 5)}, r"embeddings has shape \[2, 4, 5\], but it must be \[2, 3, D\]"),
        ({"attention_mask": torch.ones(2, 2)}, r"attention_mask has shape \[2, 2\], but it must be \[2, 3\]"),
        ({"speech": torch.zeros(4, 6)}, r"speech has shape \[4, 6\], but it must be \[K, 5\]"),
        ({"speech": torch.zeros(4, 5, device="meta")}, "speech is on meta, but the other tensors are on cpu"),
        ({"labels": torch.zeros(2, 3)}, "labels is torch.float32, but it must be int32 or int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "cu_seqlens is empty"),
        ({"cu_seqlens": torch.tensor([0])}, "input_ids has 1 rows with an audio placeholder.* 0 recordings"),
        ({"cu_seqlens": torch.tensor([0, 1, 4])}, "input_ids has 1 rows with an audio placeholder.* 2 recordings"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens goes from 0 to 5 .* 0 to the 4 rows of speech"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens goes from 1 to 4"),
        ({"cu_seqlens": torch.tensor([4, 0])}, r"cu_seqlens goes from 4 to 0 \(shortest step -4\)"),
        ({"input_ids": torch.tensor([[1, 2, 3], [AUDIO, 1, AUDIO]])}, r"input_ids\[1\] holds the .* 2 times"),
        ({"padding_side": "top"}, "padding_side = 'top', but it must be 'right' or 'left'"),
        ({"impl": "cuda"}, "impl = 'cuda', but it must be one of auto, triton, torch"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {
        "embeddings": torch.zeros(2, 3, 5),
        "input_ids": torch.tensor([[1, 2, 3], [4, AUDIO, 6]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "speech": torch.zeros(4, 5),
        "cu_seqlens": torch.tensor([0, 4]),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "audio_placeholder_id": AUDIO,
    }
    splice(**arguments)
    with pytest.raises(ValueError, match=message):
        splice(**(arguments | change))


def test_settings_cover_the_row_with_few_programs():
    for width in (1, 7, 100, 576, 1024, 4096, 5000):
        block_d, num_warps = _config(width)
        assert block_d.bit_count() == 1 and block_d <= 1024 and 1 <= num_warps <= 4
        assert -(-width // block_d) == max(1, -(-width // 1024))
