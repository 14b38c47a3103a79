"""The cost model's table: `python -m pipeline.plan [CONFIG] [key.path=value ...] --images-per-second N`.

How long the source's training takes on more and more workers, what they wait for, and from where on it pays no more.
Exit code 0 done, 2 bad input.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.config.load import ConfigError, load_config
from pipeline.plan.scale import Link, Machine, scale, table, training_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        training = training_of(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = Machine(
        images_per_second=options.images_per_second,
        decoded_per_second=options.decoded_per_second,
        workers_per_node=options.workers_per_node,
        inside=Link(options.latency[0] * 1e-6, options.bandwidth[0] * 1e9),
        between=Link(options.latency[1] * 1e-6, options.bandwidth[1] * 1e9),
        disk=options.disk * 1e9,
    )
    print("\n".join(table([scale(training, machine, n, options.batch_per_worker) for n in options.workers])))
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan", description="What more workers make of a training."
    )
    add = parser.add_argument
    add("config", nargs="?", help="preset name or YAML file (default: the demo)")
    add("overrides", nargs="*", metavar="key.path=value")
    add("--workers", type=_count, nargs="+", default=[8, 16, 32, 64, 128, 256, 512], help="8 to 512")
    add("--images-per-second", type=_positive, required=True, help="training images of one worker, attack included")
    add("--decoded-per-second", type=_positive, default=3000.0, help="images that one worker's loader delivers (3000)")
    add("--batch-per-worker", type=_count, default=64, help="images per worker and step (64)")
    add("--workers-per-node", type=_count, default=8, help="(8)")
    add(
        "--latency",
        type=_positive,
        nargs=2,
        default=[10.0, 30.0],
        help="us: in a node, between nodes (10 30)",
    )
    add("--bandwidth", type=_positive, nargs=2, default=[200.0, 20.0], help="GB/s: in a node, between nodes (200 20)")
    add("--disk", type=_positive, default=1.0, help="GB/s that a checkpoint is written with (1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
