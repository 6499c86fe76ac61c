"""``sovit run``: run what is left of a sweep, on this machine or through Slurm."""

from __future__ import annotations

import argparse

from sovit.cli.options import PRICE_HELP, above_0, add_sweep, positive


def add(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="run what is left of a sweep on this machine or a Slurm cluster")
    add_sweep(run)
    run.add_argument("--cells-per-gpu", type=positive, metavar="K", help="small cells that share each GPU (default 1)")
    run.add_argument("--retry-failed", action="store_true", help="also run cells that failed or diverged before")
    run.add_argument(
        "--retry-diverged",
        type=above_0,
        metavar="FACTOR",
        help="repeat a diverged cell at this fraction of its learning rate, as another cell; twice at most",
    )
    run.add_argument(
        "--launcher",
        default="local",
        metavar="NAME",
        help="local (default), slurm, or another file of conf/launcher; launcher.KEY=VALUE sets one of its keys",
    )
    run.add_argument("--detach", action="store_true", help="with --launcher slurm: submit and return")
    run.add_argument(
        "--max-cost", type=above_0, metavar="USD", help="do not start if what is left costs more at --price"
    )
    run.add_argument("--price", type=above_0, metavar="USD", help=PRICE_HELP)
    run.add_argument("--max-hours", type=above_0, metavar="H", help="do not start if what is left takes longer")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sovit.launch.plan import plan
    from sovit.launch.sweep import load_sweep, metric_of

    launcher, workers = None, arguments.workers
    of_launcher = [text for text in arguments.overrides if text.startswith("launcher.")]
    sweep = load_sweep(arguments.file, [text for text in arguments.overrides if text not in of_launcher])
    if arguments.launcher != "local":
        from sovit.launch.slurm.config import load_launcher

        launcher = load_launcher(arguments.launcher, of_launcher)
        workers = workers or launcher.cells_at_once or len(sweep.cells)
    elif of_launcher or arguments.detach:
        raise ValueError(f"{(of_launcher or ['--detach'])[0]} is for a cluster; add --launcher slurm.")
    if launcher is not None and arguments.cells_per_gpu:
        raise ValueError(f"--cells-per-gpu {arguments.cells_per_gpu} is for this machine; a task of Slurm is one cell.")
    made = plan(sweep, workers=workers, cells_per_gpu=arguments.cells_per_gpu)
    if launcher is None:
        from sovit.launch.pay.throughput import expect

        made = expect(made, "missing" if arguments.max_cost or arguments.max_hours else "cached")
    if arguments.price and not arguments.max_cost:
        raise ValueError(f"--price {arguments.price:g} is for a cap; add --max-cost, or ask sovit plan for the cost.")
    if arguments.max_cost or arguments.max_hours:
        from sovit.launch.pay.cost import refuse_above

        for note in made.notes:
            print(note)
        refuse_above(
            made,
            price=arguments.price,
            max_cost=arguments.max_cost,
            max_hours=arguments.max_hours,
            retry_failed=arguments.retry_failed,
            held=launcher is None,  # a cluster bills what jobs use
        )
    common = {
        "sweep": sweep,
        "retry_failed": arguments.retry_failed,
        "retry_diverged": arguments.retry_diverged,
        "metric": metric_of(sweep.metric["name"]),
    }
    if launcher is None:
        from sovit.launch.local.runner import run_sweep

        return run_sweep(made, **common)
    from sovit.launch.slurm.runner import run_on_slurm

    return run_on_slurm(made, launcher, detach=arguments.detach, **common)
