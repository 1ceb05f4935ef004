"""Commands that train: `demo`, `train`, `ablate`, and `memory`, which predicts what a step takes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from soundwave.cli import common
from soundwave.cli.common import DEMO, QUICK_DEMO
from soundwave.training.distributed import is_first


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the model, logs, picture and summary.",
            show_default=f"{DEMO}, with --quick {QUICK_DEMO}",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short run of a few minutes instead of twenty; only shows that it works.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the corpus, the weights and the order of the samples.")
    ] = 0,
) -> None:
    """Train all three stages on synthetic speech and show the scores.

    The first run downloads two small backbones (some 160 MB) and makes its own recordings; nothing else is needed.
    """
    from soundwave.demo.run import run_demo

    common.quiet_transformers()
    out = out or (QUICK_DEMO if quick else DEMO)
    summary = run_demo(out, quick=quick, seed=seed)
    common.console.print(_summary_table(summary))
    common.say(f"model {out / 'model'} · report {out / 'report.html'} · summary {out / 'summary.json'}")
    common.say(f'now try: soundwave ask FILE.wav "Is the speaker female or male?" --model {out / "model"}')


def train(
    stage: Annotated[
        int, typer.Argument(help="Training stage: 1 alignment, 2 shrinking, 3 instruction tuning.", min=1, max=3)
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings as `key=value` words; they override those of the file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings that would be used, and stop.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Continue from the newest checkpoint in `out` even if settings or data have changed, or never "
            "continue. By default a run continues only with the same settings and data.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a sample that cannot be used, instead of leaving it out.")
    ] = False,
    allow_outside: common.AllowOutsideOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Train one stage on your own recordings.

    Settings that are not given are the paper's; `--show` lists them. Two settings are required: `train` (manifests)
    and `out` (a folder). Stages 2 and 3 start from `model`, the folder that the stage before printed. After a run has
    ended early, by Ctrl-C, a full disk or kill -9, the same command continues it.

    Example: `soundwave train 1 train=data/train.jsonl out=runs/mine/1 steps=300 batch_size=16 learning_rate=1e-3`

    On several GPUs: `torchrun --nproc-per-node 8 --no-python soundwave train 1 …`; a step then has eight times as many
    samples.
    """
    from soundwave.training.settings import StageConfig, allowed_values, load_config
    from soundwave.training.stages import samples_of_step, train_stage

    flags = {"resume": resume, "strict": strict or None, "allow_outside": allow_outside or None, "quiet": quiet or None}
    words = [f"{name}={str(value).lower()}" for name, value in flags.items() if value is not None]
    values = load_config(stage, config, [*(settings or []), *words], to_show=show)
    if show:
        table = common.table("setting", "value", "allowed", "meaning")
        for name, value in values.model_dump(mode="json").items():
            text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
            row = name, text, allowed_values(name), StageConfig.model_fields[name].description or ""
            table.add_row(*map(escape, row))
        if is_first():
            common.console.print(table)
            common.errors.print(f"a step has {samples_of_step(values)}", soft_wrap=True, highlight=False)
        return
    common.quiet_transformers()
    folder, log, seconds = train_stage(values)
    if not is_first():
        return
    names = ("ctc_loss", "lm_loss", "blank_share", "kept_per_label", "compression")
    last = {name: log[-1][name] for name in names if log[-1].get(name) is not None}
    shown = " · ".join(f"{name} {value:.3g}" for name, value in last.items())
    common.say(f"stage {stage}: {values.steps} steps in {seconds:.0f} s · {shown} · model {folder}")


def ablate(
    variants: Annotated[
        list[str] | None,
        typer.Argument(
            help="Variants to train, by default all: soundwave, no-cross-attention, no-stage-1, runs, swapped, "
            "stacked-3, stacked-4, uneven, uneven-plain, no-labels.",
            metavar="VARIANT…",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the models, answers and tables.")] = Path(
        "runs/ablations"
    ),
    scale: Annotated[
        float, typer.Option(min=0.01, max=10, help="Factor on the number of steps of the demonstration.")
    ] = 1.0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Trainings that run at the same time; times are measured after all of them.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the corpus, the weights and the order of the samples.")
    ] = 0,
) -> None:
    """Leave out or replace parts of Soundwave and compare: word error rates, accuracies, lengths, times.

    There are ten variants, each of which takes two thirds of the time of `soundwave demo`, and four alignments from
    which they start. After an interruption the same command continues.
    """
    from soundwave.demo.ablation import VARIANTS, run_ablations

    common.quiet_transformers()
    results = run_ablations(out, variants or tuple(VARIANTS), scale=scale, jobs=jobs, seed=seed)
    table = common.table("variant", "WER", "voice", "rate", "intent", "question", "kept a second")
    for name, found in results.items():
        accuracies = (f"{found['accuracy'][task]['value']:.1%}" for task in ("voice", "rate", "intent", "question"))
        table.add_row(name, f"{found['wer']['value']:.1%}", *accuracies, f"{found['kept_per_second']:.1f}")
    common.console.print(table)
    common.say(
        f"tables {out / 'ablations.md'} · report {out / 'report.html'} · report of stage 1 {out / 'alignments.html'}"
    )


def memory(
    stage: Annotated[int, typer.Option(min=1, max=3, help="Training stage.")] = 1,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips per forward pass; by default the largest number that fits.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of each clip in seconds, 0.01 to 30.")] = 30.0,
    gpu: Annotated[float, typer.Option(help="Memory of the card in GiB; a 24 GB card has 24.")] = 24.0,
    eager: Annotated[bool, typer.Option("--eager", help="Plain PyTorch instead of the fused operations.")] = False,
    kept: Annotated[float, typer.Option(help="Kept frames per second, above 0; at 25 nothing is shrunk.")] = 3.0,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample's prompt and answer.")] = 150,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sample's answer; by default 80, but at most --text-tokens.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="A step on the CPU, which takes the machine's memory; --gpu is its size.")
    ] = False,
    float32: Annotated[
        bool, typer.Option("--float32", help="Products and frozen weights in float32 instead of bfloat16.")
    ] = False,
) -> None:
    """Predict the GPU memory of a training step, part by part, for Whisper-large-v3 and Llama-3.1-8B in 4 bits.

    No GPU is needed: the prediction is arithmetic. The largest batch that fits is printed too, with room left for the
    error of the prediction. All sizes are in GiB.
    """
    from soundwave.memory import TOLERANCE, largest_batch, predict, table

    settings = {
        "gpu_gib": gpu, "kept_per_second": kept, "text_tokens": text_tokens, "answer_tokens": answer_tokens,
        "implementation": "eager" if eager else "fused", "device": "cpu" if cpu else "cuda",
        "dtype": "float32" if float32 else "bfloat16",
    }  # fmt: skip
    try:
        most = largest_batch(stage, seconds, **settings)
    except ValueError as error:  # "name = value, but …", with the name of the argument: it becomes the option's
        name, _, rest = str(error).partition(" ")
        option = {"gpu_gib": "gpu", "kept_per_second": "kept"}.get(name, name.replace("_", "-"))
        raise ValueError(f"--{option} {rest.replace('text_tokens', '--text-tokens')}") from None
    common.console.print(table(predict(stage, batch or max(most, 1), seconds, **settings)))
    common.say(f"largest batch of stage {stage} on {gpu:g} GiB, {TOLERANCE:.0%} kept free: {most or 'none'}")


def _summary_table(summary: dict) -> Table:
    def percent(value: float) -> str:
        return f"{value:.1%}"

    one, three, seconds = summary["stage1"], summary["stage3"], summary["seconds"]
    table = Table("", "score", "samples", title=f"Soundwave demo · {seconds['total'] / 60:.1f} minutes", box=None)
    samples = summary["samples"]
    table.add_row("I   CTC word error rate", percent(one["wer"]), "")
    table.add_row("I   blank share · kept per label", f"{one['blank_share']:.2f} · {one['kept_per_label']:.2f}", "")
    table.add_row("II  word error rate", percent(summary["stage2"]["wer"]), "")
    table.add_row("III word error rate", percent(three["wer"]), str(samples["transcribe"]))
    unseen = str(samples["transcribe_unseen_voices"])
    table.add_row("III word error rate, unseen voices", percent(three["wer_unseen_voices"]), unseen)
    for task, value in three["accuracy"].items():
        table.add_row(f"III {task}", percent(value), str(samples[task]))
    table.add_row("seconds I · II · III", " · ".join(f"{seconds[f'stage{i}']:.0f}" for i in (1, 2, 3)), "")
    return table
