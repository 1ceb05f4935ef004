"""The fused losses in the place of torch's and Transformers' own: what those take is taken, with the same results.

| kind                        | variants                                                                              |
|-----------------------------|---------------------------------------------------------------------------------------|
| lengths                     | lists, tuples, numpy; int8 to int64, uint8, uint16; a number for one utterance        |
| targets                     | int8 to int64, uint8; [B, U] and [S]                                                  |
| torch's default device      | lists follow the tensors; nothing else is made elsewhere                              |
| meta tensors                | shapes and dtypes of results and gradients                                            |
| torch.func                  | vmap has each slice's values and gradients; derivatives are refused in one line       |
| torch.jit.script            | refused in one line, alone and inside a model                                         |
| arguments of modules        | a wrong type is refused where the module is made, by name                             |
| models of Transformers      | value and every gradient of their own loss; labels padded anywhere, with -100 or blank |
"""

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

from soundwave import eager, fused
from soundwave.fused import functional as F

TARGETS, INPUT, LABELS = torch.tensor([[1, 2], [3, 0]]), [6, 5], [2, 1]
CONCATENATED = torch.tensor([1, 2, 3])
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LOG_PROBS, HIDDEN, HEAD = drawn(6, 2, 5).log_softmax(-1), drawn(2, 6, 4), drawn(5, 4)
LARGE, FRAMES, SCALE, SHIFT = drawn(700, 4), drawn(2, 12, 4), drawn(4), drawn(4) + 1


def ctc(log_probs, targets=TARGETS, input_lengths=INPUT, target_lengths=LABELS):
    return F.ctc_loss(log_probs, targets, input_lengths, target_lengths, reduction="none")


def linear_ctc(hidden, targets=TARGETS, input_lengths=INPUT, target_lengths=LABELS, weight=HEAD):
    return F.linear_ctc_loss(hidden, weight, targets, input_lengths, target_lengths, blank=0, reduction="none").loss


def cross_entropy(hidden, weight=HEAD, target=TARGETS):
    return F.linear_cross_entropy(hidden[:, :2], weight, target, reduction="none")


# ---- lengths and targets


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("loss", [ctc, linear_ctc])
def test_lengths_and_targets_of_every_integer_dtype_give_the_same_loss(loss, dtype):
    given = LOG_PROBS if loss is ctc else HIDDEN
    wanted = loss(given)
    lengths = torch.tensor(INPUT).to(dtype), torch.tensor(LABELS).to(dtype)
    assert torch.equal(loss(given, TARGETS.to(dtype), *lengths), wanted)
    assert torch.equal(loss(given, CONCATENATED.to(dtype), *lengths), wanted)
    assert torch.equal(loss(given, TARGETS, torch.tensor(INPUT), lengths[1]), wanted)
    if loss is ctc:
        torch.testing.assert_close(nn.functional.ctc_loss(given, TARGETS.to(dtype), *lengths, reduction="none"), wanted)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_peaks_and_adapters_take_lengths_of_every_integer_dtype(dtype):
    lengths = torch.tensor(INPUT).to(dtype)
    path = torch.tensor([[1, 1, 0, 2, 2, 0], [0, 3, 3, 0, 1, 1]])
    peaks = F.ctc_peaks(path, lengths, blank=0, scores=torch.zeros(2, 6))
    assert peaks.index.tolist() == [0, 3, 7, 10]
    torch.manual_seed(0)
    alignment, shrinking = fused.AlignmentAdapter(CONFIG), fused.ShrinkingAdapter(CONFIG)
    hidden, counts = alignment(drawn(2, 12, 4), torch.tensor([12, 9]).to(dtype))
    assert counts.tolist() == [6, 5]
    assert torch.equal(shrinking(hidden, lengths, peaks), shrinking(hidden, INPUT, peaks))


@pytest.mark.parametrize(
    "make", [tuple, np.array, lambda x: [torch.tensor(n) for n in x]], ids=["tuple", "numpy", "tensors"]
)
def test_sequences_of_lengths(make):
    assert torch.equal(ctc(LOG_PROBS, TARGETS, make(INPUT), make(LABELS)), ctc(LOG_PROBS))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_one_utterance_may_have_numbers_as_lengths(batched, dtype):
    log_probs, targets = LOG_PROBS[:, :1], TARGETS[:1]
    if not batched:
        log_probs, targets = log_probs[:, 0], targets[0]
    found = ctc(log_probs, targets, torch.tensor(6).to(dtype), torch.tensor(2).to(dtype))
    wanted = nn.functional.ctc_loss(log_probs, targets, torch.tensor(6), torch.tensor(2), reduction="none")
    torch.testing.assert_close(found, wanted)
    assert torch.equal(linear_ctc(HIDDEN[:1], TARGETS[:1], torch.tensor(6), 2), linear_ctc(HIDDEN)[:1])


def test_a_number_for_several_utterances_is_refused():
    with pytest.raises(ValueError, match=r"input_lengths has shape \[\], but it must be \[2\]"):
        ctc(LOG_PROBS, TARGETS, torch.tensor(6), LABELS)


@pytest.mark.parametrize("wrong", [torch.tensor([6.0, 5.0]), torch.tensor([True, True]), [True, False], [6.0, 5.0]])
def test_lengths_that_are_no_integers_are_refused(wrong):
    with pytest.raises(ValueError, match="input_lengths is torch.*, but it must be of an integer dtype"):
        ctc(LOG_PROBS, TARGETS, wrong, LABELS)


# ---- torch's default device

CONFIG = SimpleNamespace(
    audio_hidden_size=4, hidden_size=8, num_attention_heads=2, frame_stack=2, attend="frames", keys="all",
    adapter_dropout=0.0, layer_norm_eps=1e-5,
)  # fmt: skip
PATH = torch.tensor([[1, 1, 0, 2, 2, 0], [0, 3, 3, 0, 1, 1]])
SCORES = drawn(2, 6)


def _adapters():
    torch.manual_seed(0)
    with torch.device("cpu"):
        alignment, shrinking = fused.AlignmentAdapter(CONFIG), fused.ShrinkingAdapter(CONFIG)
    hidden, _ = alignment(FRAMES, [12, 9])
    return shrinking(hidden, [6, 5], F.ctc_peaks(PATH, [6, 5], blank=0, scores=SCORES))


EVERYTHING = {
    "ctc_loss": lambda: ctc(LOG_PROBS),
    "ctc_loss concatenated": lambda: ctc(LOG_PROBS, CONCATENATED),
    "linear_ctc_loss": lambda: linear_ctc(HIDDEN),
    "linear_ctc_loss concatenated": lambda: linear_ctc(HIDDEN, CONCATENATED),
    "linear_ctc_loss of a large head": lambda: linear_ctc(HIDDEN, weight=LARGE),
    "linear_ctc_path": lambda: F.linear_ctc_path(HIDDEN, HEAD, INPUT, blank=0)[0],
    "linear_cross_entropy": lambda: cross_entropy(HIDDEN),
    "ctc_peaks": lambda: F.ctc_peaks(PATH, [6, 5], blank=0, scores=SCORES).index,
    "ctc_peaks runs": lambda: F.ctc_peaks(PATH, [6, 5], blank=0, keep="runs").index,
    "adapters": _adapters,
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_torchs_default_device_changes_nothing(name):
    wanted = EVERYTHING[name]()
    with torch.device("meta"):  # as torch.set_default_device("meta"), and undone at the end
        found = EVERYTHING[name]()
    assert found.device.type == "cpu" and torch.equal(found, wanted)


def test_gradients_do_not_depend_on_the_default_device_either():
    leaf = HIDDEN.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(linear_ctc(leaf).sum() + cross_entropy(leaf).sum(), leaf)
    with torch.device("meta"):
        (found,) = torch.autograd.grad(linear_ctc(leaf).sum() + cross_entropy(leaf).sum(), leaf)
    assert torch.equal(found, wanted)


# ---- meta tensors


def shapes(loss, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)
    return [(x.shape, x.dtype) for x in (value, *gradients)]


@pytest.mark.parametrize("lengths", ["list", "cpu", "meta"])
@pytest.mark.parametrize("targets", [TARGETS, CONCATENATED], ids=["padded", "concatenated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype, targets, lengths):
    def run(device):
        given = [INPUT, LABELS]
        if lengths != "list":
            given = [torch.tensor(x, device=device if lengths == "meta" else "cpu") for x in given]
        labels, hidden, head = targets.to(device), HIDDEN.to(device, dtype), HEAD.to(device, dtype)
        return (
            shapes(lambda h, w: linear_ctc(h, labels, *given, w), hidden, head),
            shapes(lambda h, w: cross_entropy(h, w, TARGETS.to(device)), hidden, head),
            shapes(lambda x: ctc(x, labels, *given), LOG_PROBS.to(device, dtype)),
            [(x.shape, x.dtype) for x in F.linear_ctc_path(hidden, head, given[0], blank=0)],
        )

    assert run("meta") == run("cpu")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_meta_losses_with_a_blank_row_of_its_own(reduction):
    hidden, head, row, bias = (x.to("meta").requires_grad_() for x in (HIDDEN, HEAD, drawn(4), drawn()))
    out = F.linear_ctc_loss(
        hidden, head, TARGETS.to("meta"), INPUT, LABELS, blank=5, blank_weight=row, blank_bias=bias,
        reduction=reduction,
    )  # fmt: skip
    assert out.loss.shape == ((2,) if reduction == "none" else ()) and out.path.shape == (2, 6)
    out.loss.sum().backward()
    assert [x.grad.shape for x in (hidden, head, row, bias)] == [(2, 6, 4), (5, 4), (4,), ()]


def test_a_size_that_depends_on_values_is_refused_on_meta():
    alignment = fused.AlignmentAdapter(CONFIG).to("meta")
    frames = drawn(2, 12, 4).to("meta")
    assert alignment(frames, [12, 9])[0].shape == (2, 6, 8)
    with pytest.raises(ValueError, match="lengths is on meta, but it must have values"):
        alignment(frames, torch.tensor([12, 9], device="meta"))
    with pytest.raises(ValueError, match="path is on meta, but it must have values"):
        F.ctc_peaks(PATH.to("meta"), INPUT, blank=0, keep="runs")


# ---- torch.func

DIFFERENTIABLE = {
    "ctc_loss": (lambda x: ctc(x.log_softmax(-1)).sum(), LOG_PROBS),
    "linear_ctc_loss": (lambda x: linear_ctc(x).sum(), HIDDEN),
    "linear_cross_entropy": (lambda x: cross_entropy(x).sum(), HIDDEN),
    "add_layer_norm": (lambda x: F.add_layer_norm(x, x, SCALE, SHIFT).pow(2).sum(), drawn(6, 4)),
    "shrink_attention": (
        lambda x: F.shrink_attention(x, x, x, *[torch.tensor([0, 3, 5], dtype=torch.int32)] * 2, 3, 3).pow(2).sum(),
        drawn(5, 2, 4),
    ),
}
DERIVATIVES = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(y).sum())(torch.stack([x, x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
}


@pytest.mark.parametrize("transform", DERIVATIVES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_derivative_of_torch_func_is_refused_in_one_line(name, transform):
    with pytest.raises(
        NotImplementedError, match=rf"^{name}: the derivatives of torch.func .* use torch.autograd.grad"
    ):
        DERIVATIVES[transform](*DIFFERENTIABLE[name])


@pytest.mark.parametrize("name", ["jvp", "jacfwd"])
def test_a_forward_derivative_of_torch_func_is_refused_in_one_line(name):
    loss, x = DIFFERENTIABLE["ctc_loss"]
    with pytest.raises(NotImplementedError, match="^ctc_loss: forward-mode derivatives are not there"):
        torch.func.jvp(loss, (x,), (x,)) if name == "jvp" else torch.func.jacfwd(loss)(x)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_the_adapters_refuse_the_derivatives_of_torch_func_by_name(transform):
    alignment, frames = fused.AlignmentAdapter(CONFIG), drawn(2, 12, 4)

    def loss(x):
        return alignment(x, [12, 9])[0].sum()

    with pytest.raises(NotImplementedError, match="^AlignmentAdapter: "):
        torch.func.grad(loss)(frames) if transform == "grad" else torch.func.jvp(loss, (frames,), (frames,))


def test_what_needs_no_gradient_is_computed_inside_of_one():
    wanted = ctc(LOG_PROBS).sum()
    found = torch.func.grad(lambda x: x.sum() * ctc(LOG_PROBS).sum())(torch.ones(3))
    torch.testing.assert_close(found, wanted.expand(3))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_has_the_values_and_gradients_of_each_slice(name):
    loss, x = DIFFERENTIABLE[name]
    leaf = torch.stack([x, 2 * x, -x]).requires_grad_()
    wanted = torch.stack([loss(one) for one in leaf])
    found = torch.func.vmap(loss)(leaf)
    torch.testing.assert_close(found, wanted)
    weights = torch.tensor([1.0, -2.0, 3.0])
    (gradient,), (truth,) = (torch.autograd.grad(value @ weights, leaf) for value in (found, wanted))
    torch.testing.assert_close(gradient, truth)
    assert truth.any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_lengths_and_labels():
    log_probs = torch.stack([LOG_PROBS, LOG_PROBS.flip(0)])
    rest = torch.stack([TARGETS, TARGETS.flip(0)]), torch.tensor([[6, 5], [4, 6]]), torch.tensor([[2, 1], [1, 2]])
    found = torch.func.vmap(ctc)(log_probs, *rest)
    torch.testing.assert_close(found, torch.stack([ctc(*one) for one in zip(log_probs, *rest, strict=True)]))


def test_vmap_over_what_gives_a_size_is_refused_in_one_line():
    paths = torch.stack([PATH, PATH])
    with pytest.raises(NotImplementedError, match="^ctc_peaks: torch.func.vmap is not there"):
        torch.func.vmap(lambda path: F.ctc_peaks(path, INPUT, blank=0, keep="runs").index)(paths)
    alignment, frames = fused.AlignmentAdapter(CONFIG), drawn(2, 2, 12, 4)
    with pytest.raises(NotImplementedError, match="^AlignmentAdapter: torch.func.vmap is not there"):
        torch.func.vmap(alignment)(frames, torch.tensor([[12, 9], [12, 9]]))
    with pytest.raises(NotImplementedError, match=r"^targets \[S\], one after the other: torch.func.vmap is not there"):
        torch.func.vmap(lambda lengths: ctc(LOG_PROBS, CONCATENATED, INPUT, lengths))(torch.tensor([[2, 1], [1, 2]]))


# ---- scripting, and arguments of modules

MODULES = {
    "CTCLoss": fused.CTCLoss,
    "LinearCTCLoss": lambda **words: fused.LinearCTCLoss(**{"blank": 0} | words),
    "LinearCrossEntropyLoss": fused.LinearCrossEntropyLoss,
    "AlignmentAdapter": lambda **words: fused.AlignmentAdapter(CONFIG, **words),
    "ShrinkingAdapter": lambda **words: fused.ShrinkingAdapter(CONFIG, **words),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_torchscript_is_refused_in_one_line(name, inside):
    module = MODULES[name]()
    with pytest.raises(NotImplementedError, match=rf"^fused.{name} cannot be scripted: use torch.compile.*$"):
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), module) if inside else module)


WRONG = [
    *[(name, "blank", value) for name in ("CTCLoss", "LinearCTCLoss") for value in ("a", 0.0, None, True, -1, [0])],
    *[(name, "zero_infinity", value) for name in ("CTCLoss", "LinearCTCLoss") for value in ("no", 1, None)],
    *[(name, "reduction", value) for name in list(MODULES)[:3] for value in (None, 0, "avg", ["mean"])],
    *[(name, "validate", value) for name in list(MODULES)[:3] for value in ("yes", 0)],
    *[(name, "impl", value) for name in MODULES for value in (None, "cuda", 0, ["torch"])],
    *[(name, "exact", "yes") for name in ("LinearCTCLoss", "LinearCrossEntropyLoss")],
    *[("LinearCrossEntropyLoss", "ignore_index", value) for value in ("a", -100.0, None, False)],
    *[("AlignmentAdapter", "attention", value) for value in (None, "flash", 3)],
]


@pytest.mark.parametrize(("name", "argument", "value"), WRONG, ids=str)
def test_a_wrong_argument_of_a_module_is_refused_where_it_is_made(name, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} = .*, but it must be "):
        MODULES[name](**{argument: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[({"eps": value}, "eps = .*, but it must be a finite number of at least 0") for value in ("a", -1.0, None)],
        *[({"return_sum": value}, "return_sum = .*, but it must be True or False") for value in ("no", 1)],
        *[({"scale": value}, "scale = .*, but it must be a finite number") for value in ("a", float("nan"), True)],
        *[({"max_seqlen_k": value}, "max_seqlen_k = .*, but it must be an integer") for value in (3.5, None)],
    ],
    ids=str,
)
def test_a_wrong_argument_of_a_function_is_named_in_one_line(words, message):
    x, (query, bounds) = drawn(6, 4), (drawn(5, 2, 4), torch.tensor([0, 3, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=f"^{message}$"):
        if words.keys() <= {"eps", "return_sum"}:
            F.add_layer_norm(x, x, SCALE, SHIFT, **words)
        else:
            F.shrink_attention(query, query, query, bounds, bounds, **{"max_seqlen_q": 3, "max_seqlen_k": 3} | words)


@pytest.mark.parametrize("labels", [None, [[1, 2]]], ids=str)
def test_labels_that_are_no_tensor_are_named(labels):
    with pytest.raises(TypeError, match="^labels is a .*, but it must be a tensor$"):
        fused.transformers_ctc_loss(drawn(1, 7, 12), labels, torch.tensor([7]), 0)


def test_numpys_integer_is_a_blank():
    assert fused.CTCLoss(blank=np.int64(3)).blank == 3


WRONG_SETTINGS = {
    "hidden_size": ["8", 8.0, 0, True, None, 9],  # 9 is no multiple of the two heads
    "num_attention_heads": ["2", 0, 2.5],
    "frame_stack": ["2", 0, None],
    "audio_hidden_size": [4.5, -1],
    "attend": ["all", None, 1],
    "keys": ["some", None],
    "adapter_dropout": ["0.1", 1.5, -0.1, None],
    "layer_norm_eps": ["1e-5", -1.0, float("nan"), None],
}
OF_SHRINKING = {"hidden_size", "num_attention_heads", "keys", "layer_norm_eps"}
SETTINGS = [
    (adapter, name)
    for adapter in ("AlignmentAdapter", "ShrinkingAdapter")
    for name in WRONG_SETTINGS
    if (name in OF_SHRINKING if adapter == "ShrinkingAdapter" else name != "keys")
]


@pytest.mark.parametrize(("adapter", "name"), SETTINGS, ids=str)
@pytest.mark.parametrize("package", [fused, eager], ids=["fused", "eager"])
def test_a_wrong_or_missing_setting_of_an_adapter_is_named(package, adapter, name):
    make = getattr(package, adapter)
    for value in WRONG_SETTINGS[name]:
        with pytest.raises(ValueError, match=rf"{name} = .*, but it must be "):
            make(SimpleNamespace(**vars(CONFIG) | {name: value}))
    kept = {key: value for key, value in vars(CONFIG).items() if key != name}
    with pytest.raises(AttributeError, match=f"config has no attribute {name}"):
        make(SimpleNamespace(**kept))
    assert f"`{name}`" in make.__doc__


def test_an_adapter_needs_no_setting_beyond_those_of_its_docstring():
    for adapter in ("AlignmentAdapter", "ShrinkingAdapter"):
        needed = {name: getattr(CONFIG, name) for of, name in SETTINGS if of == adapter}
        getattr(fused, adapter)(SimpleNamespace(**needed))


def test_the_examples_in_docstrings_run():
    import soundwave.fused.adapters as adapters

    found = doctest.testmod(adapters)
    assert found.attempted >= 10 and not found.failed


# ---- models of Transformers

of_transformers = pytest.mark.skipif(
    "ForCTC" not in LOSS_MAPPING, reason="CTC models ask for `loss_function` since Transformers 5.21"
)

SMALL = {
    "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "conformer_conv_dropout": 0.0, "final_dropout": 0.0,
    "mask_time_prob": 0.0, "apply_spec_augment": False,
    "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "pad_token_id": 0,
}  # fmt: skip
CONVOLUTIONS = {
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 4, 4), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WAVES = ["Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "Wav2Vec2Conformer", "SEW"]
BERT, PARAKEET, LASR = "Wav2Vec2Bert", "Parakeet", "Lasr"
ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "num_mel_bins": 8,
    "dropout": 0.0, "dropout_positions": 0.0, "layerdrop": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    "subsampling_conv_channels": 8,
}  # fmt: skip


def model_and_input(name):
    """A small random CTC model and a batch of two clips, the second of them shorter."""
    torch.manual_seed(0)
    make = getattr(transformers, f"{name}ForCTC")
    if name in WAVES:
        more = {"squeeze_factor": 1} if name == "SEW" else {}
        model = make(getattr(transformers, f"{name}Config")(**SMALL | CONVOLUTIONS | more))
        mask = (torch.arange(8000) < torch.tensor([[8000], [6000]])).long()
        return model, {"input_values": drawn(2, 8000) * mask, "attention_mask": mask}
    if name == BERT:
        config = transformers.Wav2Vec2BertConfig(**SMALL | {"feature_projection_input_dim": 16})
        mask = (torch.arange(60) < torch.tensor([[60], [45]])).long()
        return make(config), {"input_features": drawn(2, 60, 16), "attention_mask": mask}
    config = getattr(transformers, f"{name}CTCConfig")(
        vocab_size=12, encoder_config=ENCODER, ctc_loss_reduction="mean", ctc_zero_infinity=True, pad_token_id=0
    )
    mask = (torch.arange(320) < torch.tensor([[320], [240]])).long()
    return make(config), {"input_features": drawn(2, 320, 8), "attention_mask": mask}


def loss_and_gradients(model, batch, labels):
    model.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FORMS = {
    "-100 at the end": [[1, 2, 2, 5], [3, 4, -100, -100]],
    "blank at the end": [[1, 2, 2, 5], [3, 4, 0, 0]],
    "both, anywhere": [[-100, 1, 0, 2, -100, 2, 5], [0, 0, 3, -100, -100, 4, 0]],
    "one without labels": [[1, 2, 3], [-100, 0, -100]],
}


@of_transformers
@pytest.mark.parametrize("name", [*WAVES, BERT, PARAKEET, LASR])
def test_a_ctc_model_of_transformers_has_the_loss_and_gradients_of_its_own(name):
    if not hasattr(transformers, f"{name}ForCTC"):
        pytest.skip(f"this transformers has no {name}ForCTC")
    torch.use_deterministic_algorithms(False)
    model, batch = model_and_input(name)
    model.train()
    own = {form: loss_and_gradients(model, batch, torch.tensor(labels)) for form, labels in FORMS.items()}
    calls = []

    def counted(*args, **words):
        calls.append(words)
        return fused.transformers_ctc_loss(*args, **words)

    model.loss_function = counted
    for form, labels in FORMS.items():
        loss, gradients = loss_and_gradients(model, batch, torch.tensor(labels))
        wanted, truth = own[form]
        torch.testing.assert_close(loss, wanted)
        assert gradients.keys() == truth.keys() and len(truth) > 10
        whole, error = (
            torch.cat([x.flatten() for x in parts])
            for parts in (truth.values(), [gradients[key] - truth[key] for key in truth])
        )
        assert whole.norm() > 0 and error.norm() <= 1e-4 * whole.norm()
    assert len(calls) == len(FORMS)


@of_transformers
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [True, False])
def test_the_function_of_transformers_is_its_own(reduction, zero_infinity):
    from transformers.loss.loss_ctc import ForCTCLoss

    logits = drawn(4, 7, 12)
    labels = torch.tensor([[1, -100, 2, 0], [3, 3, 3, 3], [-100] * 4, [0, 5, 0, 6]])  # the second needs 7 frames
    given = labels, torch.tensor([7, 6, 5, 4]), 0, reduction, zero_infinity
    torch.testing.assert_close(fused.transformers_ctc_loss(logits, *given), ForCTCLoss(logits, *given))
    labels = labels.masked_fill(labels == -100, -7)
    given = labels, *given[1:]
    torch.testing.assert_close(
        fused.transformers_ctc_loss(logits, *given, ignore_index=-7, num_items_in_batch=3),
        ForCTCLoss(logits, *given, ignore_index=-7, num_items_in_batch=3),
    )


def test_a_label_that_is_no_padding_and_no_class_is_named():
    with pytest.raises(ValueError, match=r"targets\[0, 1\] = -1, but it must be 0 to 11"):
        fused.transformers_ctc_loss(drawn(1, 7, 12), torch.tensor([[-100, 3, -1]]), torch.tensor([7]), 0)
