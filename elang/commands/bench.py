"""`elang bench`: what a pair costs and what dispatch takes of it, or what the fused op wins, on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elang.commands.options import AsJson, one_line, share

if TYPE_CHECKING:
    from elang.evaluation.pair_bench import PairBench
    from elang.evaluation.route_bench import RouteBench

DEVICES = ("cpu", "cuda")


def _each(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads values with commas between them."""

    def parse(text: str) -> Any:
        return tuple(read(part.strip()) for part in text.split(","))

    return parse


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"got {text!r}, wanted rows of a batch, >= 1")
    return int(text)


def _mode(text: str) -> str:
    from elang.dispatch import MODES

    if text not in MODES:
        raise typer.BadParameter(f"got {text!r}, wanted some of {', '.join(MODES)}")
    return text


def _head(text: str) -> tuple[int, int]:
    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if shape is None or int(shape[2]) < 2:
        raise typer.BadParameter(f"got {text!r}, wanted HxC such as 768x3, of two classes or more")
    return int(shape[1]), int(shape[2])


def bench(
    swift: Annotated[
        str | None, typer.Option(help="Folder or hub id of the small fine-tuned classifier; needs --super.")
    ] = None,
    super_: Annotated[
        str | None, typer.Option("--super", help="Folder or hub id of the large one; needs --swift.")
    ] = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            parser=_each(_rows), metavar="N,...", help="Rows of a batch: 1,8,32 of a pair, 1,8,64,512 of the op alone."
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Of the pair: in all, of which complete batches are timed; 32, or one largest batch."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Of the pair: tokens of a row, where rows differ of the longest; 128.")
    ] = None,
    ragged: Annotated[bool, typer.Option("--ragged", help="Of the pair: random rows of random lengths.")] = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Of the pair: your rows in place of random tokens, a UTF-8 file with a column text.",
        ),
    ] = None,
    shares: Annotated[
        Any,
        typer.Option(
            "--share", parser=_each(share), metavar="SHARE,...", help="Of the pair: rows routed; 0,.12,.31,.5,1."
        ),
    ] = None,
    dispatch: Annotated[
        Any,
        typer.Option(parser=_each(_mode), metavar="MODE,...", help="Of the pair: exact, bucket, capacity, or some."),
    ] = None,
    head: Annotated[
        Any,
        typer.Option(parser=_each(_head), metavar="HxC,...", help="Of the op alone: 312x2,768x3,1024x20 by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are of so many.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; as many as it takes by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path, typer.Option("-o", "--output", dir_okay=False, help="Everything that was measured, as JSON.")
    ] = Path("bench.json"),
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Of the pair: speed-up against share routed, such as bench.png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a pair of classifiers costs, and what dispatch takes of it, on this machine.

    Swift, Super on batches of each size that dispatch makes, and the joint model in each mode at each share of the rows
    routed, in one process and in alternation. `elang calibrate` takes the costs from the file that is written. Without
    --swift and --super it is the fused op against the eager chain of linear, logsumexp, lt and nonzero.

    Example: elang bench --swift ID --super ID --batch-size 1,32 --share 0,.31,1 --threads 1 -o bench.json --plot b.png
    """
    if (swift is None) != (super_ is None):
        raise typer.BadParameter("--swift, --super: got one of them, wanted both, or none for the op alone")
    of_pair = {"--rows": rows, "--length": length, "--ragged": ragged or None, "--csv": csv, "--share": shares}
    of_pair |= {"--dispatch": dispatch, "--plot": plot}
    if swift is None and (got := [name for name, value in of_pair.items() if value is not None]):
        raise typer.BadParameter(f"{', '.join(got)}: got without --swift and --super, wanted with a pair only")
    if swift is not None and head is not None:
        raise typer.BadParameter("--head: got beside --swift and --super, whose head it is, wanted without a pair only")
    if csv is not None and ragged:
        raise typer.BadParameter("--ragged: got beside --csv, whose rows have lengths of their own")
    if device not in DEVICES:
        raise typer.BadParameter(f"--device: got {device!r}, wanted one of {', '.join(DEVICES)}")
    with one_line("elang bench"):
        import torch

        from elang.evaluation import bench_report, pair_bench, route_bench
        from elang.progress import bar

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device: got cuda, wanted cpu: torch {torch.__version__} sees no CUDA device")
        for path in filter(None, (output, plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        asked = {"shares": shares, "dispatch": dispatch, "heads": head}
        asked |= {"rows" if swift is None else "batch_sizes": batch_size}
        options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        options |= {"rounds": rounds, "threads": threads}
        found: PairBench | RouteBench
        if swift is None or super_ is None:
            with bar("measuring") as report:
                found = route_bench.bench_route(**options, device=device, report=report)
        else:
            (first, second), inputs, data = _load(swift, super_, csv, rows, length, ragged, batch_size, device)
            with bar("measuring") as report:
                found = pair_bench.bench_pair(first, second, inputs, **options, data=data, report=report)
        found.save(output)
        if plot is not None and isinstance(found, pair_bench.PairBench):
            bench_report.plot_pair(found).savefig(plot)
        if as_json:
            typer.echo(found.model_dump_json(indent=2))
            return
        from rich.console import Console

        for table in bench_report.tables(found):
            Console().print(table, "", sep="\n")
        typer.echo(f"Written: {', '.join(map(str, filter(None, (output, plot))))}")


def _load(
    swift: str,
    super_: str,
    csv: Path | None,
    rows: int | None,
    length: int | None,
    ragged: bool,
    batch_sizes: tuple[int, ...] | None,
    device: str,
) -> tuple[tuple[Any, Any], dict[str, Any], str]:
    """The models, the rows, and what these are."""
    from transformers.utils import logging

    from elang.evaluation import pair_bench
    from elang.evaluation.classifiers import Classifier
    from elang.evaluation.predict import Encoded, longest_input
    from elang.evaluation.run import labels_of, load_model
    from elang.evaluation.tasks import Task
    from elang.texts import read_texts

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    task = Task("super", texts=(), source_text="", labels=tuple(labels_of("super", super_)))
    loaded = [load_model(role, name, task, device=device) for role, name in (("swift", swift), ("super", super_))]
    tokens = pair_bench.LENGTH if length is None else length
    for each in loaded:
        if not isinstance(each, Classifier):
            raise ValueError(f"{each.role}: got {type(each.model).__name__}, wanted a sequence classifier")
        if (longest := longest_input(each.tokenizer, each.model.config)) is not None and tokens > longest:
            raise ValueError(f"--length: got {tokens}, wanted at most {longest}, the longest input of {each.role}")
    models = loaded[0].model, loaded[1].model
    n = max(pair_bench.ROWS, *(batch_sizes or pair_bench.BATCH_SIZES)) if rows is None else rows
    if csv is None:
        data = "random tokens, ragged" if ragged else "random tokens"
        return models, pair_bench.random_rows(*models, n, length=tokens, ragged=ragged), data
    texts = read_texts(csv)
    if rows is not None and len(texts) < rows:
        raise ValueError(f"--rows: got {rows}, wanted at most {len(texts)}, the rows of {csv}")
    encoded = []
    for each in loaded:
        each.tokenizer.padding_side = "right"  # where rows are trimmed
        first, *second = zip(*texts[:n], strict=True)
        encoded.append(Encoded(each.tokenizer, first, tokens, *second))
    if encoded[0].sha256 != encoded[1].sha256:
        raise ValueError("swift, super: got models that read different tokens, wanted a pair with one tokenizer")
    return models, encoded[0].batch(range(len(encoded[0]))), csv.name
