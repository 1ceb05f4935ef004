"""One training step of each stage, forward and backward without the optimiser, with the same batch for all contenders.

Two frozen parts of the step are timed alone in the same rounds: the encoder, and the language model over as many
tokens, without its head and loss. They are the same for all contenders, so their share of eager's time (1 / `x eager`)
limits what the fused modules can gain. For the mixture there is also eager with the input of the released code: each
clip is padded to the longest, and the padding is treated as audio.
"""

import gc

import pytest
import torch

from bench import shapes
from bench.contenders import plain
from bench.model import ANSWER, PROMPT, batch_of, flops, make_models, prepare
from bench.race import Absent, Operation, Problem
from soundwave import eager


def problem(case: shapes.Case, device: torch.device) -> Problem:
    models = prepare(case, device)
    trained = [p for p in models["eager"].parameters() if p.requires_grad]
    names = list(batch_of(case, device))

    def inputs(seed: int) -> tuple:
        return tuple(batch_of(case, device, seed=seed).values())

    def step(model):
        def run(*tensors):
            return model(**dict(zip(names, tensors, strict=True))).loss

        return run

    def released_padding():
        if case.lengths == "equal":
            raise Absent("all clips have the same length: nothing is padded")
        batch = batch_of(case, device, padded=True)
        return lambda *_: step(models["eager"])(*batch.values())

    scale = torch.ones((), device=device, requires_grad=True)

    def encoder_alone():
        def run(*tensors):
            batch = dict(zip(names, tensors, strict=True))
            with torch.no_grad(), models["eager"]._autocast():
                frames, _ = models["eager"].encode(batch["input_features"], batch["feature_lengths"])
            return scale * frames[0, 0, 0]  # a scalar that depends on a parameter, for backward

        return run

    def language_model_alone():
        if case.stage == 1:
            raise Absent("stage I runs no language model")
        model = models["eager"]
        tokens = shapes.kept_frames(shapes.lengths(case.B, case.T, case.lengths)) + PROMPT - 1 + ANSWER
        mask = eager.length_mask(tokens, int(tokens.max())).to(device)
        embeddings = torch.randn(*mask.shape, case.D, device=device, dtype=case.dtype)

        def run(*_):
            with model._autocast():
                states = model.language_model.base_model(
                    inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False
                ).last_hidden_state
            return states.float().square().mean()

        return run

    makers = {
        "eager": plain(step(models["eager"])),
        "compiled": lambda: step(models["compiled"].compile_parts()),
        "released-padding": released_padding,
        "encoder-alone": encoder_alone,
        "language-model-alone": language_model_alone,
        "ours": plain(step(models["ours"])),
    }
    return Problem(
        inputs,
        makers,
        parameters={name: trained for name in makers} | {"encoder-alone": [scale]},
        flops={"both": flops(case, models["eager"])},
        partial=("encoder-alone", "language-model-alone"),
        different=("released-padding",),
    )


STAGES = Operation(
    "stages",
    shapes.stages,
    problem,
    ("eager", "compiled", "released-padding", "encoder-alone", "language-model-alone", "ours"),
)


@pytest.fixture(autouse=True, scope="module")
def free_models():
    yield
    make_models.cache_clear()
    gc.collect()


@pytest.mark.operation(STAGES)
def test_stages(race):
    race()
