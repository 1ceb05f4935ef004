"""Answers to recordings: encoder, adapters and greedy `generate` of a fixed number of new tokens.

"released-padding" is eager with each clip padded to the longest, where the padding is treated as audio. Compiled
adapters are measured in `bench_stages.py`.
"""

import gc

import pytest
import torch

from bench import shapes
from bench.contenders import plain
from bench.model import batch_of, flops, make_models, prepare
from bench.race import Absent, Operation, Problem


def problem(case: shapes.Case, device: torch.device) -> Problem:
    models = prepare(case, device)
    names = list(batch_of(case, device))

    def inputs(seed: int) -> tuple:
        return tuple(batch_of(case, device, seed=seed).values())

    def answer(model):
        def run(*tensors):
            batch = dict(zip(names, tensors, strict=True))
            return model.generate(**batch, max_new_tokens=case.new_tokens, do_sample=False)

        return run

    def released_padding():
        if case.lengths == "equal":
            raise Absent("all clips have the same length: nothing is padded")
        batch = batch_of(case, device, padded=True)
        return lambda *_: answer(models["eager"])(*batch.values())

    return Problem(
        inputs,
        {
            "eager": plain(answer(models["eager"])),
            "released-padding": released_padding,
            "ours": plain(answer(models["ours"])),
        },
        flops={"forward": flops(case, models["eager"])},
        trains=False,
        different=("released-padding",),
    )


GENERATE = Operation(
    "generate",
    shapes.generate,
    problem,
    ("eager", "released-padding", "ours"),
    parts=("forward",),
)


@pytest.fixture(autouse=True, scope="module")
def free_models():
    yield
    make_models.cache_clear()
    gc.collect()


@pytest.mark.operation(GENERATE)
def test_generate(race):
    race()
