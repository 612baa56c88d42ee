"""`elang serve`: a pair of classifiers behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from elang.commands.options import Device, number, one_line, positive

TOKEN = "ELANG_SERVE_TOKEN"
WARM_UP = "warm-up"


def serve(
    swift: Annotated[str, typer.Option(help="Folder or hub id of the small fine-tuned classifier.")],
    super_: Annotated[str, typer.Option("--super", help="Folder or hub id of the large one.")],
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="From `elang calibrate`; read anew on SIGHUP.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="In place of a calibration, with --threshold.")] = None,
    threshold: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="Swift keeps a row scored at least this.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    device: Device = None,
    super_device: Annotated[str | None, typer.Option(help="Where Super goes instead.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of Swift's batch at most.")] = 32,
    super_batch: Annotated[int, typer.Option(min=1, help="Rows of Super's batch at most.")] = 32,
    super_wait_us: Annotated[
        float, typer.Option(min=0.0, help="Microseconds that a routed row may wait for others.")
    ] = 2000.0,
    queue_rows: Annotated[int, typer.Option(min=1, help="Rows held at once; past that a request gets a 503.")] = 1024,
    deadline_ms: Annotated[
        float | None,
        typer.Option(parser=positive, metavar="MS", help="Of requests that name none: then Swift answers."),
    ] = None,
    super_timeout: Annotated[
        float, typer.Option(parser=positive, metavar="SECONDS", help="After which a call of Super has failed.")
    ] = 10.0,
    on_super_error: Annotated[
        str, typer.Option(help="swift: its rows get Swift's answer, marked degraded; raise: a 502.")
    ] = "swift",
    max_texts: Annotated[int, typer.Option(min=1, help="Texts of a request at most.")] = 256,
    max_characters: Annotated[int, typer.Option(min=1, help="Of a text at most; a model's own limit cuts.")] = 20_000,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, for each operation on the CPU.")] = None,
) -> None:
    """Serve a pair: POST /classify, GET /healthz, /readyz, /metrics, /threshold; the OpenAPI page is /docs.

    Requests are batched across clients: Swift's batches form at once, Super's of whatever rows are routed. With a
    token in the environment variable ELANG_SERVE_TOKEN, PUT /threshold moves the threshold. SIGTERM ends what is under
    way, then the service.

    Example: elang serve --swift ID --super ID --calibration calibration.json --port 8000
    """
    if (calibration is None) == (threshold is None) or (calibration is not None and score is not None):
        raise typer.BadParameter("wanted either --calibration, or --threshold with or without --score")
    if on_super_error not in ("swift", "raise"):
        raise typer.BadParameter(f"--on-super-error: got {on_super_error!r}, wanted swift or raise")
    with one_line("elang serve"):
        import torch

        from elang.calibration import Calibration
        from elang.router import Router
        from elang.serve import text_batcher
        from elang.serve.app import create_app
        from elang.serve.schemas import Limits

        try:
            import uvicorn
        except ImportError as error:
            raise ImportError("elang serve needs uvicorn: pip install 'elang[serve]'") from error
        if threads is not None:
            torch.set_num_threads(threads)
        of_file = None if calibration is None else Calibration.load(calibration)
        monitor = None if of_file is None else of_file.monitor()
        router: Calibration | Router
        if of_file is not None:
            router = of_file
        else:
            assert threshold is not None, "one of the two is given"
            router = Router(score or "energy", threshold=threshold)
        batcher = text_batcher(
            swift=swift,
            super=super_,
            router=router,
            device=device,
            super_device=super_device,
            on_super_error="swift" if on_super_error == "swift" else "raise",
            super_timeout=super_timeout,
            max_batch=max_batch,
            super_batch=super_batch,
            super_wait=super_wait_us / 1e6,
            queue_rows=queue_rows,
            on_route=None if monitor is None else monitor.update,
        )
        try:
            batcher.submit([WARM_UP]).result()
        except BaseException:
            batcher.close()
            raise
        service = create_app(
            batcher,
            warm_up=[WARM_UP],
            limits=Limits(
                texts=min(max_texts, queue_rows),
                characters=max_characters,
                bytes=max(1 << 20, 8 * max_characters),
                deadline=None if deadline_ms is None else deadline_ms / 1000,
            ),
            token=os.environ.get(TOKEN) or None,
            reload=None if calibration is None else lambda: Calibration.load(calibration),
            monitor=monitor,
        )
        uvicorn.run(service, host=host, port=port, log_level="info")
