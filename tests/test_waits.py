"""What the host waits for on a GPU, and how many kernels are launched, counted without one (see `count_waits`)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soundwave.fused import functional as fused
from tests.waits_page import DOCUMENT, document

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, list]]:
    """The counts, from a process of their own, because they change torch for all that runs in it."""
    command = [sys.executable, str(ROOT / "tests" / "count_waits.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


MOST_LAUNCHES = 40  # of linear CTC, forward and backward, in one chunk
WAITS = {
    "ctc_loss": 0,
    "ctc_loss, labels and lengths on the GPU": 0,
    "linear_ctc_loss, exact": 0,
    "linear_ctc_loss, exact, 5 utterances": 0,
    "linear_ctc_loss, exact, two chunks": 0,
    "linear_ctc_loss, exact, trained head": 0,
    "linear_ctc_loss, exact, labels and lengths on the GPU": 1,  # the lengths, for the number of rows
    "linear_ctc_loss, skipping": 0,
    "linear_ctc_loss, skipping, two chunks": 0,
    "linear_ctc_loss, skipping, reduction none": 0,
    "linear_cross_entropy": 0,
    "linear_cross_entropy, every option": 0,
    "linear_cross_entropy, target on the GPU": 1,  # the number of rows that are not ignored
    "add_layer_norm": 0,
    "shrink_attention": 0,
    "ctc_peaks": 1,  # the number of kept frames
    "splice": 1,  # the length of the result
    "a step of stage I": 1,  # whether losses and gradient are finite
    "a step of stage II": 3,  # the same, peaks, splice
}


def number(cases, case: str, what: str) -> int:
    return sum(count for *_, count in cases[case][what])


@pytest.mark.parametrize(("case", "wanted"), WAITS.items())
def test_the_host_waits_for_nothing_else(cases, case, wanted):
    assert number(cases, case, "waits") == wanted, cases[case]["waits"]


def test_every_case_is_bounded(cases):
    assert cases.keys() == WAITS.keys()


def test_launches_of_linear_ctc_do_not_grow_with_the_batch(cases):
    launches = number(cases, "linear_ctc_loss, exact", "launches")
    assert launches <= MOST_LAUNCHES
    assert number(cases, "linear_ctc_loss, exact, 5 utterances", "launches") == launches
    # Two products, the pass over logits, and the rows of dH put where they belong.
    assert number(cases, "linear_ctc_loss, exact, two chunks", "launches") == launches + 4


def test_the_page_says_what_is_counted(cases):
    """`python tests/count_waits.py --write` writes it."""
    assert DOCUMENT.read_text() == document(cases)


def linear_ctc_on(device: str, exact: bool = True) -> Callable[[], list[torch.Tensor]]:
    hidden, weight = torch.randn(2, 30, 64, device=device), torch.randn(500, 64, device=device)
    lengths = torch.tensor([30, 21]), torch.tensor([4, 2])  # on the CPU
    targets = torch.randint(1, 500, (2, 4))

    def call() -> list[torch.Tensor]:
        leaf = hidden.detach().requires_grad_()
        loss = fused.linear_ctc_loss(leaf, weight, targets, *lengths, blank=0, exact=exact).loss
        return [loss, *torch.autograd.grad(loss, leaf)]

    return call


def skipping_ctc_on(device: str) -> Callable[[], list[torch.Tensor]]:
    return linear_ctc_on(device, exact=False)


def ctc_on(device: str) -> Callable[[], list[torch.Tensor]]:
    log_probs = torch.randn(30, 2, 50, device=device).log_softmax(-1)
    given = [x.to(device) for x in (torch.randint(1, 50, (2, 4)), torch.tensor([30, 21]), torch.tensor([4, 2]))]

    def call() -> list[torch.Tensor]:
        leaf = log_probs.detach().requires_grad_()
        loss = fused.ctc_loss(leaf, *given)
        return [loss, *torch.autograd.grad(loss, leaf)]

    return call


def cross_entropy_on(device: str) -> Callable[[], list[torch.Tensor]]:
    hidden, weight = torch.randn(60, 64, device=device), torch.randn(500, 64, device=device)
    target = torch.randint(500, (60,))
    target[::3] = -100

    def call() -> list[torch.Tensor]:
        leaf = hidden.detach().requires_grad_()
        loss = fused.linear_cross_entropy(leaf, weight, target)
        return [loss, *torch.autograd.grad(loss, leaf)]

    return call


def norm_on(device: str) -> Callable[[], list[torch.Tensor]]:
    x, residual, weight, bias = (torch.randn(n, 64, device=device) for n in (20, 40, 1, 1))
    index = torch.arange(0, 40, 2, device=device)

    def call() -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = fused.add_layer_norm(leaf, residual, weight[0], bias[0], residual_index=index)
        return [out, *torch.autograd.grad(out.sum(), leaf)]

    return call


def attention_on(device: str) -> Callable[[], list[torch.Tensor]]:
    query, key, value = (torch.randn(n, 2, 32, device=device) for n in (12, 60, 60))
    bounds = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 8, 12], [0, 30, 60])]

    def call() -> list[torch.Tensor]:
        leaf = query.detach().requires_grad_()
        out = fused.shrink_attention(leaf, key, value, *bounds, 8, 30)
        return [out, *torch.autograd.grad(out.sum(), leaf)]

    return call


@pytest.mark.gpu
@pytest.mark.parametrize("make", [linear_ctc_on, skipping_ctc_on, ctc_on, cross_entropy_on, norm_on, attention_on])
def test_what_never_waits_is_captured_in_a_cuda_graph(make):
    """A wait while a graph is captured is an error of CUDA's. The graph is replayed twice, over memory used since."""
    torch.manual_seed(0)
    call = make("cuda")
    expected = [x.clone() for x in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels and fills the caches outside of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        # What the graph sends from the CPU, which is pinned, must still be there.
        noise = [torch.full((1 << size,), -1, pin_memory=True) for size in range(20) for _ in range(4)]
        graph.replay()
        del noise
        assert all(map(torch.equal, captured, expected))
