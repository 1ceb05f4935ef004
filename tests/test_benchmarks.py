"""The benches: shapes and generators, the timing of contenders, results, their comparison, and the page."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import history, race, shapes, skipping
from bench.history import BenchRun, Entry
from soundwave import eager
from soundwave.fused import functional
from soundwave.kernels.active_columns import Skipped
from soundwave.provenance import device_name, slug
from tests import test_active_columns

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ---------------------------------------------------------------- lengths and paths


@pytest.mark.parametrize("batch", [4, 5, 8, 16, 32, 63])
def test_the_mixture_is_at_most_45_percent_of_its_longest_clip_on_average(batch):
    lengths = shapes.lengths(batch, 750, "mixture").double()
    assert lengths.mean() / 750 <= 0.45
    assert (lengths.min(), lengths.max()) == (75, 750)


def test_too_few_clips_for_a_mixture_are_refused():
    with pytest.raises(ValueError, match="batch = 3, but a mixture needs at least 4 clips"):
        shapes.lengths(3, 750, "mixture")


def test_every_case_of_clips_comes_as_a_mixture_too():
    for size in shapes.SIZES:
        for cases in (shapes.shrink, shapes.alignment, shapes.stages, shapes.generate):
            assert {case.lengths for case in cases(size)} == {"equal", "mixture"}


def test_a_planted_path_keeps_three_frames_a_second():
    lengths = shapes.lengths(5, 750, "mixture")
    path, scores = shapes.planted_path(lengths, 99, 99, CPU)
    peaks = eager.ctc_peaks(path, lengths, blank=99, scores=scores)
    assert peaks.cu_seqlens.diff().tolist() == [int(length) * 3 // 25 for length in lengths]


# ---------------------------------------------------------------- logits


@pytest.fixture(scope="module")
def head():
    return shapes.make_head(32_768, 1024, torch.float32, CPU)


def draw(head, logits, lengths="equal"):
    case = shapes.Case("", torch.float32, B=4, T=24, D=1024, V=len(head), U=6, logits=logits, lengths=lengths)
    return shapes.utterances(case, head)


def test_random_logits_are_standard_gaussians(head):
    logits = draw(head, "random").hidden.flatten(0, 1)[:8] @ head.T
    assert abs(float(logits.mean())) < 0.01
    assert abs(float(logits.std()) - 1) < 0.1  # rows of hidden differ in norm by 1 / sqrt(2 · 1024)


def test_peaky_rows_are_sure_of_the_planted_label_and_doubt_twenty_tokens(head):
    made = draw(head, "peaky")
    hidden = made.hidden.flatten(0, 1)
    logits = torch.cat([hidden @ head.T, (hidden @ made.blank_weight)[:, None]], 1)
    top = logits.softmax(-1).topk(1 + shapes.CONFUSABLE).values
    assert float((top[:, 0] > 0.5).double().mean()) > 0.95
    off_label = 1 - top[:, 0].double()
    assert float((top[:, 1:].sum(1) / off_label).median()) > 0.95


def test_peaky_rows_spell_their_targets_in_order(head):
    made = draw(head, "peaky")
    logits = torch.cat([made.hidden @ head.T, (made.hidden @ made.blank_weight)[..., None]], -1)
    for path, targets in zip(logits.argmax(-1), made.targets.tolist(), strict=True):
        assert [label for label in torch.unique_consecutive(path).tolist() if label != len(head)] == targets


@pytest.mark.parametrize(("logits", "least", "most"), [("random", 0.9, 1.0), ("peaky", 0.0, 0.25)])
def test_columns_can_be_skipped_in_peaky_logits_only(head, logits, least, most):
    made = draw(head, logits)
    hidden = made.hidden.requires_grad_()
    out = functional.linear_ctc_loss(
        hidden,
        head,
        made.targets,
        made.input_lengths,
        made.target_lengths,
        blank=len(head),
        blank_weight=made.blank_weight,
        blank_bias=made.blank_bias,
        exact=False,
    )
    assert least <= float(out.active_share) <= most


# ---------------------------------------------------------------- contenders


def test_what_the_bench_measures_is_the_rule(monkeypatch):
    """`bench/skipping.py` stands in for a GPU, whose kernels are held to the same definition."""
    monkeypatch.setattr(skipping, "TILE_ROWS", 64)
    p, weight, off_label = test_active_columns.make(150, 1500, strength=11.0)
    p[:64], off_label[:64] = 1e-3 * p[:64], 1e-3 * off_label[:64]
    skipped = Skipped.empty(len(p), off_label)
    product = skipping.product_in_tiles(p, weight, off_label, skipped, None, None, "triton")
    expected, share, lost = test_active_columns.definition(p, weight, off_label, "triton")
    torch.testing.assert_close(skipped.share.double(), share)
    torch.testing.assert_close(skipped.mass.double(), lost)
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-5)
    assert share[0] < share[-1] < 0.25 and share.unique().numel() == 3


@pytest.fixture
def bench_linear_ctc(request):
    """The bench's file, whose mark only the benches' own configuration knows."""
    request.config.addinivalue_line("markers", "operation: of the benches")
    return importlib.import_module("bench.bench_linear_ctc")


def test_pruned_ctc_gets_the_whole_head_and_gives_the_mean(bench_linear_ctc, monkeypatch):
    """Its package needs k2, which fits few versions of torch, so both are stand-ins with the arguments of theirs."""
    seen = []

    class RaggedTensor:
        def __init__(self, rows):
            self.rows = rows

        def to(self, device):
            return self

    def pruned_ctc_loss(
        encoder_out, weight, bias, y, encoder_out_lens, *,
        chunk_size=4096, output_beam=100.0, max_states=100_000_000, blank_id=0,
    ):  # fmt: skip
        seen.append((weight.shape, bias.shape, len(y.rows), blank_id))
        log_probs = torch.nn.functional.linear(encoder_out, weight, bias).log_softmax(-1).transpose(0, 1)
        targets, counts = torch.tensor(sum(y.rows, [])), torch.tensor([len(row) for row in y.rows])
        return torch.nn.functional.ctc_loss(log_probs, targets, encoder_out_lens, counts, blank_id, "sum")

    monkeypatch.setitem(sys.modules, "k2", SimpleNamespace(RaggedTensor=RaggedTensor))
    monkeypatch.setitem(sys.modules, "pruned_ctc", SimpleNamespace(pruned_ctc_loss=pruned_ctc_loss))
    case = shapes.linear_ctc("tiny")[0]
    problem = bench_linear_ctc.problem(case, CPU)
    inputs = problem.inputs(0)
    results = {}
    for name in ("eager", "pruned-ctc", "recompute", "ours-torch-exact"):
        loss = problem.contenders[name]()(*inputs)
        results[name] = loss, *torch.autograd.grad(loss, inputs[0])
    for name, found in results.items():
        torch.testing.assert_close(found, results["eager"], msg=lambda text, name=name: f"{name}: {text}")
    assert seen == [((case.V + 1, case.D), (case.V + 1,), case.B, case.V)]
    mixture = dataclasses.replace(case, lengths="mixture")
    with pytest.raises(race.Absent, match="it sums over utterances"):
        bench_linear_ctc.problem(mixture, CPU).contenders["pruned-ctc"]()


def test_a_contender_whose_package_is_not_there_is_named(bench_linear_ctc):
    missing = bench_linear_ctc.LINEAR_CTC.missing("pruned-ctc", CPU)
    assert not missing or missing in ("pruned-ctc: k2 is not installed", "pruned-ctc: pruned_ctc is not installed")


# ---------------------------------------------------------------- timing


def time_it(contenders, **kwargs):
    problem = race.Problem(lambda seed: (torch.ones(2**18, requires_grad=True),), contenders, **kwargs)
    return race.race(problem, list(contenders), torch.float32, "tiny", CPU)


def test_contenders_take_turns_and_each_is_first_in_some_round():
    calls = []

    def contender(name):
        def make():
            calls.clear()  # of the warm-up of the contender before

            def run(x):
                calls.append(name)
                return x.sum()

            return run

        return make

    result = time_it({name: contender(name) for name in "abc"})
    rounds = len(result.laps["a"].seconds["both"])
    turns = "".join(calls[-3 * rounds :])
    assert rounds == race.MIN_ROUNDS
    assert [turns[i : i + 3] for i in range(0, 3 * rounds, 3)] == ["abc", "bca", "cab", "abc", "bca"]


def test_a_step_is_the_sum_of_its_parts():
    laps = time_it({"eager": lambda: lambda x: (x * x).sum()}).laps["eager"]
    for forward, backward, both in zip(*(laps.seconds[part] for part in history.PARTS), strict=True):
        assert both == pytest.approx(forward + backward)
        assert min(forward, backward) > 0


def test_the_peak_is_what_a_step_adds_to_its_inputs():
    laps = time_it({"eager": lambda: lambda x: (x * 2).relu().sum()}).laps["eager"]
    tensor = 4 * 2**18
    # Forward holds the product and its relu; backward holds their gradients and the relu.
    assert 2 * tensor <= laps.peak_bytes["forward"] < 2.1 * tensor
    assert 2 * tensor <= laps.peak_bytes["backward"] < 3.1 * tensor
    assert laps.peak_bytes["both"] == max(laps.peak_bytes["forward"], laps.peak_bytes["backward"])


def test_a_contender_without_backward_is_timed_forward_only():
    laps = time_it({"eager": lambda: lambda x: x.sum(), "forward-only": lambda: lambda x: x.detach().sum()}).laps
    assert not laps["forward-only"].failed
    assert set(laps["forward-only"].seconds) == {"forward"}
    assert set(laps["eager"].seconds) == set(history.PARTS)


def double(x):
    return (2 * x).sum()


@pytest.mark.parametrize(
    ("contender", "told"),
    [
        (lambda x: (2.01 * x).sum(), "the result lies 0.005 of its norm from eager's"),
        (lambda x: double(x.detach()) + (0 * x).sum(), "the gradient lies 1 of its norm from eager's"),
        (lambda x: double(x.detach()) + torch.zeros((), requires_grad=True), "no gradient for 1 of 1 tensors"),
        (lambda x: double(x)[None], r"the result has shape \[1\], but eager's \[\]"),
        (lambda x: double(x) * float("nan"), "the result lies nan of its norm"),
    ],
)
def test_a_contender_that_computes_something_else_fails(contender, told):
    laps = time_it({"eager": lambda: double, "peer": lambda: contender}).laps
    assert re.search(told, laps["peer"].failed) and not laps["peer"].seconds
    assert laps["eager"].seconds and not laps["eager"].failed


def test_contenders_that_need_not_agree_are_named():
    other = {"eager": lambda: double, "ours-wrong": lambda: lambda x: x.sum()}
    assert time_it(other).laps["ours-wrong"].failed
    assert not time_it(other, different=("ours-wrong",)).laps["ours-wrong"].failed
    assert not time_it(other, partial=("ours-wrong",)).laps["ours-wrong"].failed


def test_padding_does_not_count_where_the_bench_says_so():
    counts = torch.ones(2**18)
    counts[5] = 0
    makers = {"eager": lambda: lambda x: 2 * x, "ours": lambda: lambda x: 2 * x * counts}
    assert "the result lies" in time_it(makers).laps["ours"].failed
    assert not time_it(makers, counts=counts).laps["ours"].failed


@pytest.mark.parametrize("error", [ImportError("no kernel"), torch.OutOfMemoryError("full")])
def test_what_excuses_a_peer_is_a_failure_of_ours(error):
    def broken(x):
        raise error

    laps = time_it({"eager": lambda: double, "peer": lambda: broken, "ours": lambda: broken}).laps
    assert laps["peer"].absent and not laps["peer"].failed
    assert laps["ours"].failed and not laps["ours"].absent


def test_ours_without_a_backward_fails():
    laps = time_it({"eager": lambda: double, "ours": lambda: lambda x: double(x.detach())}).laps
    assert laps["ours"].failed == "ours: it has no backward"


def test_a_contender_that_cannot_be_made_is_absent_by_name():
    def make():
        raise race.Absent("it needs something else")

    laps = time_it({"eager": lambda: lambda x: x.sum(), "peer": make}).laps
    assert laps["peer"].absent == "peer: it needs something else"
    assert not laps["peer"].seconds


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    what = {"operation": "o", "case": "c", "shape": {"T": 1}, "dtype": "float32", "part": "both", "contender": "ours"}
    slow_minutes = [1.0, 9.0, 1.0, 5.0]
    entry = Entry.from_rounds(
        slow_minutes, [2 * seconds for seconds in slow_minutes], **what, roof_flops=1.0, roof_bytes=1.0
    )
    assert (entry.ratio, entry.ratio_spread) == (2.0, 0.0)
    assert entry.spread > 0


def test_the_share_of_the_roof_is_of_the_one_that_binds():
    what = {"operation": "o", "case": "c", "shape": {"T": 1}, "dtype": "float32", "part": "both", "contender": "ours"}
    entry = Entry.from_rounds([2.0], None, **what, flops=10.0, roof_flops=10.0, bytes=40.0, roof_bytes=20.0)
    assert entry.share == 1.0  # 1 s of operations, 2 s of traffic


# ---------------------------------------------------------------- a run


def bench_command(results: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", ROOT / "bench" / "bench_ctc.py", "-p", "no:cacheprovider", "-rs"]
    return [str(part) for part in (*command, "--size", "tiny", "--results", results, "-k", "not compiled", *options)]


def bench_environment(**more: str) -> dict[str, str]:
    """The environment without pytest-xdist's variables: in one of its workers pytest-benchmark measures nothing."""
    return {name: value for name, value in os.environ.items() if "XDIST" not in name} | more


def run_benches(results: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command, environment = bench_command(results, *options), bench_environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run of one bench at its smallest size: its folder of results, $OUT, and its output."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("out")
    done = run_benches(results, OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return results, out, done.stdout


@pytest.fixture
def run(finished) -> BenchRun:
    (only,) = history.load(finished[0])
    return only


def test_a_run_writes_one_file_named_after_device_date_and_commit(finished, run):
    (path,) = finished[0].rglob("*.json")
    assert path.relative_to(finished[0]).as_posix() == (
        f"{slug(device_name())}/{run.date:%Y-%m-%d-%H%M%S}-{run.commit}.json"
    )


def test_a_run_writes_to_the_folder_out_as_well(finished):
    (path,), (copy,) = finished[0].rglob("*.json"), finished[1].rglob("*.json")
    assert copy.read_bytes() == path.read_bytes()


def test_every_figure_says_where_when_what_and_how_far_from_the_roof(run):
    assert run.device and run.commit and run.date.tzinfo is not None
    assert run.versions["torch"] == version("torch")
    assert {entry.contender for entry in run.entries} == {"eager", "ours-torch"}
    assert {entry.part for entry in run.entries} == set(history.PARTS)
    for entry in run.entries:
        assert entry.shape and entry.dtype == "float32" and entry.rounds >= 5
        assert entry.seconds > 0 and entry.spread >= 0 and entry.ratio > 0 and entry.peak_bytes > 0
        assert entry.share > 0


def test_an_unknown_field_in_a_result_is_refused(run):
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        BenchRun.model_validate({**run.model_dump(), "colour": "green"})


def test_absent_contenders_are_named_with_the_reason(finished, run):
    assert {skipped.reason for skipped in run.skipped} >= {"ours-triton: it needs CUDA", "cudnn: it needs CUDA"}
    assert "ours-triton: it needs CUDA" in finished[2]


def test_the_table_of_pytest_benchmark_has_every_contender_of_a_group(finished):
    assert "benchmark 'ctc · V 32 · both': 2 tests" in finished[2]


# ---------------------------------------------------------------- comparison


@pytest.fixture
def clean(run) -> BenchRun:
    """The run, as if its checkout were clean and it had no `-k`."""
    return run.model_copy(update={"commit": "abc1234", "whole": True})


def earlier(run: BenchRun, factor: float, days: int = 1, **changes) -> BenchRun:
    """The run, as if it were some days older and its ratios `factor` times as high."""
    entries = [entry.model_copy(update={"ratio": entry.ratio * factor, "ratio_spread": 0.0}) for entry in run.entries]
    return run.model_copy(update={"date": run.date - timedelta(days=days), "entries": entries} | changes)


def with_entries(run: BenchRun, **changes) -> BenchRun:
    """The run with some values of its entries replaced; the new values are functions of the entry."""
    entries = [
        entry.model_copy(update={name: change(entry) for name, change in changes.items()}) for entry in run.entries
    ]
    return run.model_copy(update={"entries": entries})


def ours(run: BenchRun) -> list[Entry]:
    return [entry for entry in run.entries if entry.contender.startswith("ours")]


def test_ratios_that_fell_by_more_than_their_spread_are_named(clean):
    worse, compared = history.compare(clean, [earlier(clean, 1000)])
    assert compared == 2 * len(worse) == 2 * len(ours(clean))  # ratios and memory
    assert worse[0].startswith("ctc · V 32 · forward · ours-torch: ") and "in 1 earlier run" in worse[0]


@pytest.mark.parametrize(("ratio", "spread", "worse"), [(0.85, 0.06, False), (0.85, 0.04, True), (0.91, 0.0, False)])
def test_a_ratio_may_fall_by_its_spread_and_what_runs_of_the_same_code_drift(clean, ratio, spread, worse):
    before = with_entries(clean, ratio=lambda entry: 1.0, ratio_spread=lambda entry: 0.0)
    now = with_entries(clean, ratio=lambda entry: ratio, ratio_spread=lambda entry: spread)
    assert bool(history.compare(now, [before])[0]) is worse


def test_what_has_become_unsteady_does_not_excuse_itself(clean):
    before = with_entries(clean, ratio=lambda entry: 3.0, ratio_spread=lambda entry: 0.0)
    now = with_entries(clean, ratio=lambda entry: 1.5, ratio_spread=lambda entry: 2.7)
    assert len(history.compare(now, [before])[0]) == len(ours(clean))


def test_many_small_losses_do_not_pass_one_after_the_other(clean):
    runs = [with_entries(clean, ratio=lambda entry, n=n: 0.92**n, ratio_spread=lambda entry: 0.0) for n in range(6)]
    found = [bool(history.compare(runs[n], runs[:n])[0]) for n in range(1, 6)]
    assert not found[0] and found[-1]


def test_more_memory_and_a_vanished_ratio_are_worse(clean):
    more = with_entries(clean, peak_bytes=lambda entry: 2 * entry.peak_bytes)
    assert all("of memory, but" in line for line in history.compare(more, [earlier(clean, 1.0)])[0])
    gone = with_entries(clean, ratio=lambda entry: None, ratio_spread=lambda entry: None)
    assert len(history.compare(gone, [earlier(clean, 1.0)])[0]) == len(ours(clean))
    unknown = with_entries(clean, peak_bytes=lambda entry: None)
    assert "unknown of memory, but" in history.compare(unknown, [earlier(clean, 1.0)])[0][0]


@pytest.mark.parametrize("change", [{"commit": "abc1234-changed"}, {"whole": False}, {"worse": ["slow"]}], ids=str)
def test_runs_that_do_not_count_are_nobodys_measure(clean, change, tmp_path):
    """Such a run has a changed checkout, is restricted to some contenders, or was found worse itself."""
    assert history.compare(clean, [earlier(clean, 1000, **change)]) == ([], 0)
    earlier(clean, 1.0, days=2, size="cpu").save(tmp_path)
    newer = clean.model_copy(update=change | {"size": "cpu"}).save(tmp_path)
    page = history.write_page(tmp_path, tmp_path / "benchmarks.md")
    day = f"{clean.date - timedelta(days=2):%Y-%m-%d}"
    assert f"{day} {clean.date:%H:%M} UTC" in page.read_text() and f"{clean.date:%Y-%m-%d}" not in page.read_text()
    for other in set(tmp_path.rglob("*.json")) - {newer}:
        other.unlink()
    history.write_page(tmp_path, page)  # A device's only run is shown all the same.
    assert f"{clean.date:%Y-%m-%d}" in page.read_text()
    assert ("a part of the suite" in page.read_text()) is (change == {"whole": False})


def test_results_of_other_devices_shapes_threads_and_torches_are_not_compared(clean):
    before = earlier(clean, 1000)
    larger = with_entries(before, shape=lambda entry: entry.shape | {"T": 2 * entry.shape["T"]})
    others = [{"device": "another"}, {"threads": 99}, {"versions": before.versions | {"torch": "1.0"}}]
    assert history.compare(clean, [larger, *(before.model_copy(update=other) for other in others)]) == ([], 0)


def test_the_option_compare_fails_a_run_that_became_slower(clean, tmp_path):
    """The slower group is timed twice and named, and the run does not count for later ones."""
    earlier(clean, 1000).save(tmp_path)
    done = run_benches(tmp_path, "--compare")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "ctc · V 32 · both · ours-torch: " in done.stdout
    _, slow = history.load(tmp_path)
    assert len(slow.worse) == len(ours(slow)) and not slow.counts
    assert len({entry.key for entry in slow.entries}) == len(slow.entries)


def test_only_what_came_to_its_end_without_a_choice_is_whole(run, tmp_path):
    assert not run.whole  # -k "not compiled"
    assert run_benches(tmp_path / "whole", "-k", "").returncode == 0
    (found,) = history.load(tmp_path / "whole")
    assert found.whole
    process = subprocess.Popen(bench_command(tmp_path / "killed", "-k", ""), cwd=ROOT, env=bench_environment())
    while not list((tmp_path / "killed").rglob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (killed,) = history.load(tmp_path / "killed")
    assert len(killed.entries) < len(found.entries) and not killed.whole


# ---------------------------------------------------------------- page


@pytest.fixture
def page(clean, tmp_path) -> Path:
    run = clean.model_copy(update={"size": "cpu"})
    for each in (run, earlier(run, 0.5)):
        each.save(tmp_path / "results")
    return history.write_page(tmp_path / "results", tmp_path / "docs" / "benchmarks.md")


def test_the_page_shows_the_newest_figures_beside_the_earlier_ratio(page, clean):
    run = clean
    entry = next(entry for entry in ours(run) if entry.part == "both" and entry.case == "V 32")
    (line,) = (line for line in page.read_text().splitlines() if "**ours-torch**" in line)
    day_before = run.date - timedelta(days=1)
    assert f"{entry.ratio:.2f} ±" in line
    assert f"{entry.ratio / 2:.2f} ± 0.00 ({day_before:%Y-%m-%d}, {run.commit})" in line


def test_the_page_draws_the_growth_curves_and_links_to_them(page):
    (image,) = page.with_suffix("").glob("*-ctc-growth.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert f"](benchmarks/{image.name})" in page.read_text()


def test_the_page_names_what_did_not_run_and_that_no_gpu_was_there(page):
    text = page.read_text()
    assert "not run: ours-triton: it needs CUDA" in text
    assert "Nothing here was measured on a GPU yet" in text


def slow_page(clean, tmp_path, **changes) -> tuple[Path, str]:
    """The page, and the error of the command, where ours took three times as long as eager in the case V 32."""
    entries = [
        entry.model_copy(update={"ratio": 1 / 3} | changes)
        if entry.contender == "ours-torch" and entry.part == "both" and entry.case == "V 32"
        else entry
        for entry in clean.entries
    ]
    clean.model_copy(update={"size": "cpu", "entries": entries}).save(tmp_path / "results")
    page = tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "bench" / "history.py"), str(tmp_path / "results"), "--out", str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == bool(done.stderr), done.stderr
    return page, done.stderr


def test_a_row_that_is_slower_than_eager_has_its_reason_below_the_table(clean, tmp_path):
    page, error = slow_page(clean, tmp_path)
    (reason,) = (each.reason for each in history.reasons() if each.operation == "ctc")
    assert f"- V 32, ours-torch: 0.33: {reason}" in page.read_text() and not error


def test_a_row_that_is_slower_without_a_reason_is_marked_and_fails_the_command(clean, tmp_path):
    page, error = slow_page(clean, tmp_path, operation="unknown")
    assert "- V 32, ours-torch: 0.33: **no reason is known**" in page.read_text()
    assert error.startswith("slower than eager: V 32, ours-torch: 0.33: ")


def test_the_published_page_has_a_reason_for_every_row_that_is_slower():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert history.unexplained(page) == []


def test_reasons_are_one_line_and_name_cases_of_the_benches():
    for each in history.reasons():
        assert "\n" not in each.reason and each.reason.endswith(".")
        cases = {"shrink_attention": shapes.shrink}.get(each.operation) or getattr(shapes, each.operation)
        names = {case.name for case in cases(each.kind) if not case.over}
        assert set(each.cases) <= names, (each.operation, names)


def test_files_of_other_benches_are_left_alone(run, tmp_path):
    run.save(tmp_path).with_name("train_24gb-1.json").write_text("{}")
    assert len(history.load(tmp_path)) == 1


def test_a_page_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results; write some with pytest bench/"):
        history.write_page(tmp_path, tmp_path / "benchmarks.md")


def test_the_command_says_where_there_are_no_results(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "history.py"), str(tmp_path), "--out", str(tmp_path / "page.md")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path} holds no results" in done.stderr and "Traceback" not in done.stderr


def test_the_command_writes_the_page(clean, tmp_path):
    clean.model_copy(update={"size": "cpu"}).save(tmp_path / "results")
    page = tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "bench" / "history.py"), str(tmp_path / "results"), "--out", str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"page {page}\n"), done.stderr
    assert page.read_text().startswith("# ")
