"""``sidetune bench``: what the fast paths cost, measured here. Parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sidetune.cli_accuracy import bench_accuracy, bench_vtab
from sidetune.progress import say
from sidetune.usage import BackboneName, Device, Json, Out, Quiet, Size, Weights, print_json

if TYPE_CHECKING:
    from sidetune.backbones.base import Precision
    from sidetune.bench.rows import Bench
    from sidetune.store import DTypeName

bench_app = typer.Typer(help="Measure what the fast paths cost on this machine.", no_args_is_help=True)

SIZES = "Sizes"
Layers = Annotated[int, typer.Option(metavar="L", rich_help_panel=SIZES, help="Block taps.")]
Tokens = Annotated[
    int, typer.Option(metavar="N", rich_help_panel=SIZES, help="Tokens an image, one of them a class token.")
]
Width = Annotated[int, typer.Option(metavar="D", rich_help_panel=SIZES, help="Channels a token.")]
Batch = Annotated[int, typer.Option(metavar="B", rich_help_panel=SIZES, help="Images a batch.")]
Frames = Annotated[
    int | None,
    typer.Option(metavar="T", rich_help_panel=SIZES, help="Frames of a clip; B counts clips then."),
]
DType = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=SIZES, help="Of the stored taps: fp16, bf16 or fp32.")
]
Threads = Annotated[
    int | None, typer.Option(metavar="COUNT", help="Threads of PyTorch; default: its own choice.")
]
Rounds = Annotated[int, typer.Option(metavar="COUNT", help="Rounds; a row has the median of them.")]


@bench_app.command("side")
def bench_side(
    layers: Layers = 12,
    tokens: Tokens = 257,
    width: Width = 384,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", rich_help_panel=SIZES, help="Of both sides; default: LoSA 8, LAST 16."),
    ] = None,
    batch: Batch = 50,
    dtype: DType = "fp16",
    threads: Threads = None,
    rounds: Rounds = 5,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    members: Annotated[
        int | None,
        typer.Option(
            metavar="M",
            rich_help_panel=SIZES,
            help="Instead of the forms: M side networks in one model against M models of one.",
        ),
    ] = None,
    growth: Annotated[
        bool,
        typer.Option(
            "--growth", metavar="", help="Also how the time grows with N, D, L, R, B (or M): minutes."
        ),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="Draw that growth as .svg or .png; measures it, too."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time and memory of a training step: textbook forms, fast forms and the floor, in one run."""
    from sidetune.bench.members import bench_members
    from sidetune.bench.picture import check_picture, draw_growth
    from sidetune.bench.setting import Setting
    from sidetune.bench.side import bench_side as run
    from sidetune.errors import RequestError

    setting = Setting(
        layers=layers,
        tokens=tokens,
        width=width,
        rank=rank,
        batch=batch,
        dtype=cast("DTypeName", dtype),
        threads=threads,
        rounds=rounds,
        device=device,
    )
    if members is not None:
        if picture is not None:
            raise RequestError(
                "--picture draws growth with N, D, L, R and B, not with M. Type: --members without --picture"
            )
        _print(bench_members(setting, members, growth=growth, quiet=quiet), as_json)
        return
    if picture is not None:
        check_picture(picture)
    bench = run(setting, growth=growth or picture is not None, quiet=quiet)
    if picture is not None:
        draw_growth(bench, picture)
        say(f"{picture} is drawn", quiet=quiet)
    _print(bench, as_json)


@bench_app.command("read")
def bench_read(
    layers: Layers = 12,
    tokens: Tokens = 257,
    width: Width = 384,
    batch: Batch = 50,
    dtype: DType = "fp16",
    threads: Threads = None,
    rounds: Rounds = 5,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rate of reading a real feature store, warm, against plain copies of the same bytes."""
    from sidetune.bench.read import bench_read as run
    from sidetune.bench.setting import Setting

    setting = Setting(
        layers=layers,
        tokens=tokens,
        width=width,
        batch=batch,
        dtype=cast("DTypeName", dtype),
        threads=threads,
        rounds=rounds,
    )
    _print(run(setting, quiet=quiet), as_json)


bench_app.command("accuracy")(bench_accuracy)
bench_app.command("vtab")(bench_vtab)


@bench_app.command("cost")
def bench_cost(
    backbone: Annotated[
        str,
        typer.Option(metavar="NAME", help="demo, toy, or timm:MODEL, whose weights are random here."),
    ] = "timm:vit_small_patch14_dinov2",
    size: Annotated[
        int, typer.Option(metavar="PX", rich_help_panel=SIZES, help="Image side in pixels.")
    ] = 224,
    batch: Annotated[
        int | None,
        typer.Option(metavar="B", rich_help_panel=SIZES, help="Images a batch: 16; with --video clips: 1."),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            metavar="COUNT", rich_help_panel=SIZES, help="Training images, or clips, of the whole job."
        ),
    ] = 1000,
    epochs: Annotated[
        int, typer.Option(metavar="COUNT", rich_help_panel=SIZES, help="Epochs of the whole job.")
    ] = 100,
    cases: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Instead of the usual ones: a method, and suffixes, as losa-stored."
        ),
    ] = None,
    growth: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Also how cost grows with batch, size, model, epochs, members, or all."
        ),
    ] = None,
    video: Annotated[
        bool,
        typer.Option(
            "--video", help="Instead: time and memory on clips from 0.02 to 4.4 billion parameters."
        ),
    ] = False,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="With --video, of ViT-S, ViT-B, ViT-L, ViT-g, ViT-G, EVA-E."),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            rich_help_panel=SIZES,
            help="Frames of a clip; B counts clips then. With --video 8, or several: 8,16.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(metavar="NAME", help="Of the backbone: fp32 or bf16.")] = "fp32",
    threads: Threads = None,
    rounds: Rounds = 5,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time, memory and size of training by method, each in a process of its own, against LoRA's."""
    from sidetune.bench.cost import bench_cost as run
    from sidetune.bench.cost_cases import DEFAULT, CostSetting
    from sidetune.bench.cost_scale import CASES, bench_scale, require_video

    counts = _numbers("--frames", "8" if frames is None and video else frames or "")
    require_video(video, models, growth, backbone, counts)
    setting = CostSetting(
        backbone=backbone,
        size=size,
        batch=batch if batch is not None else 1 if video else CostSetting.batch,
        images=images,
        epochs=epochs,
        threads=threads,
        rounds=rounds,
        device=device,
        frames=counts[0] if counts else None,
        precision=cast("Precision", precision),
    )
    if video:
        own = CASES if cases is None else _words(cases)
        _print(bench_scale(setting, _words(models or ""), frames=counts, cases=own, quiet=quiet), as_json)
        return
    chosen = DEFAULT if cases is None else _words(cases)
    _print(run(setting, chosen, growth=_words(growth or ""), quiet=quiet), as_json)


@bench_app.command("stream")
def bench_stream(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A model of timm; its weights are random here.")
    ] = "eva02_enormous_patch14_clip_224",
    frames: Frames = 8,
    batch: Annotated[int, typer.Option(metavar="B", rich_help_panel=SIZES, help="Clips a batch.")] = 1,
    size: Annotated[
        int, typer.Option(metavar="PX", rich_help_panel=SIZES, help="Side of a frame in pixels.")
    ] = 224,
    side: Annotated[str, typer.Option(metavar="NAME", help="Whose training step is measured.")] = "losa",
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Of the backbone and its file: fp32, bf16 or fp16.")
    ] = "bf16",
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="The random weights; written where they are not there, and kept.",
        ),
    ] = None,
    threads: Threads = None,
    rounds: Rounds = 3,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Memory and time of a backbone whose blocks stay on disk: features, and a training step on them."""
    from sidetune.bench.cost_cases import CostSetting
    from sidetune.bench.stream import bench_stream as run

    setting = CostSetting(
        backbone=f"timm:{model}",
        size=size,
        batch=batch,
        frames=frames,
        precision=cast("Precision", precision),
        threads=threads,
        rounds=rounds,
        device=device,
    )
    _print(run(setting, side=side, weights=weights, quiet=quiet), as_json)


@bench_app.command("order")
def bench_order(
    out: Out,
    backbone: BackboneName = "demo",
    size: Size = 112,
    weights: Weights = None,
    scenes: Annotated[
        int, typer.Option(metavar="COUNT", rich_help_panel=SIZES, help="To train on, six clips each.")
    ] = 60,
    sides: Annotated[
        str, typer.Option(metavar="A,B", help="To train, beside ridge and the linear probe.")
    ] = "attentive,losa,last",
    seeds: Annotated[int, typer.Option(metavar="N", help="Networks a side and rate.")] = 3,
    epochs: Annotated[int, typer.Option(metavar="E", help="Of every training.")] = 30,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Whether side networks see the order of frames: clips whose classes differ in nothing else."""
    from sidetune.bench.order import OrderSetting
    from sidetune.bench.order import bench_order as run

    setting = OrderSetting(backbone, size, weights, scenes, tuple(_words(sides)), seeds, epochs, device)
    _print(run(setting, out, quiet=quiet), as_json)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> list[int]:
    from sidetune.errors import RequestError

    words = _words(text)
    if any(not word.isdecimal() or not int(word) for word in words):
        raise RequestError(f"{option} is {text}, expected whole numbers from 1. Type: {option} 8,16")
    return list(dict.fromkeys(map(int, words)))


def _print(bench: Bench, as_json: bool) -> None:
    if as_json:
        print_json(bench.to_json())
        return
    print("\n".join(bench.lines()))
