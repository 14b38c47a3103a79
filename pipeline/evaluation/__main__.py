"""Command line: judge a model, compare two evaluations, re-judge saved adversarial images, test the audit itself."""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline.artifacts import runs_root
from pipeline.config.base import one_line
from pipeline.config.evaluation import SUITES, EvaluationConfig
from pipeline.evaluation.audit.confusion import confusion_table
from pipeline.evaluation.blocks import load_arrays
from pipeline.evaluation.judged_model import evaluating, num_logits, predict
from pipeline.evaluation.promotion import paired_gain, promotion_verdict
from pipeline.evaluation.records import Evaluation
from pipeline.evaluation.sources import FORMS, open_data, open_model
from pipeline.evaluation.stats import Accuracy
from pipeline.evaluation.suite import evaluate
from pipeline.evaluation.text import describe

_ROUNDING = 1e-6
"""By which images of other tools may leave [0, 1]."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input, with one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="attack suite and audit of one model"))
    judge = commands.add_parser("judge", help="accuracy of a model on saved adversarial images (.npz with x_adv and y)")
    judge.add_argument("model", help=FORMS)
    judge.add_argument("file", type=Path, help="e.g. evaluation.npz of a run with --save-adversarial")
    _add_model_options(judge)
    judge.set_defaults(run=_judge)
    compare = commands.add_parser("compare", help="two evaluations on the same examples, and the promotion gate")
    compare.add_argument("candidate", type=Path, help="an evaluation: its directory, or evaluation.json")
    compare.add_argument("control", type=Path, help="the control's evaluation")
    compare.set_defaults(run=_compare)
    confusion = commands.add_parser("confusion", help="the audit against planted defences and honest models")
    confusion.add_argument("--num-examples", type=int, default=128, help="test images per model")
    confusion.add_argument("--budget", choices=("quick", "full"), default="quick", help="effort of the audit")
    confusion.set_defaults(run=_confusion)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", type=Path, help="with a registered activation: the network trained with it")
    parser.add_argument(
        "--registry-root", type=Path, default=runs_root(), help="where mlflow.db lies (SPARTA_RUNS, or runs)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=FORMS)
    parser.add_argument("--data", required=True, help="directory of prepared data, an .npz file, or a data set's name")
    parser.add_argument("--output", type=Path, required=True, help="directory for evaluation.json and evaluation.npz")
    parser.add_argument("--norm", default="linf", help="linf or l2")
    parser.add_argument("--eps", default="8/255", help="radius in pixel units of images in [0, 1]")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NORM:EPS", help="another adversary beside it, e.g. l2:0.5"
    )
    parser.add_argument("--attacks", default="standard", help=f"suite: {', '.join(SUITES)}")
    parser.add_argument("--audit", default="quick", help="off, quick or full")
    parser.add_argument("--num-examples", type=int, help="only so many test images, the same for every model")
    parser.add_argument("--reference", help="model for transfer attacks: a directory or module:function")
    parser.add_argument(
        "--matched", action="append", default=[], metavar="NAME=MODEL", help="network of equal cost, for check 15"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random number")
    parser.add_argument("--save-adversarial", action="store_true", help="keep every adversarial image")
    _add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline.evaluation").setLevel(logging.INFO)  # what is done so far, on stderr
    config = EvaluationConfig.model_validate(
        {
            "threat": {"norm": arguments.norm, "eps": arguments.eps},
            "attacks": arguments.attacks,
            "other_threats": [_threat(text) for text in arguments.also],
            "num_examples": arguments.num_examples,
            "save_adversarial": arguments.save_adversarial,
            "audit": {"budget": arguments.audit},
        }
    )
    model = open_model(
        arguments.model, network=arguments.network, registry_root=arguments.registry_root, device=arguments.device
    )
    reference = open_model(arguments.reference, device=arguments.device) if arguments.reference else None
    matched = dict(_named_model(text, arguments.device) for text in arguments.matched)
    prepared = open_data(arguments.data, arguments.output / "data", seed=arguments.seed)
    result = evaluate(
        model, prepared, config, arguments.output, seed=arguments.seed, reference=reference, matched=matched
    )
    print(describe(result))


def _threat(text: str) -> dict[str, str]:
    norm, separator, eps = text.partition(":")
    if not norm or not separator:
        raise ValueError(f"expected --also NORM:EPS, e.g. l2:0.5, got {text!r}")
    return {"norm": norm, "eps": eps}


def _named_model(text: str, device: str) -> tuple[str, nn.Module]:
    name, separator, source = text.partition("=")
    if not name or not separator:
        raise ValueError(f"expected --matched NAME=MODEL, got {text!r}")
    return name, open_model(source, device=device)


def _adversarial(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not file.is_file():
        raise ValueError(f"expected an .npz with x_adv and y, got {file}, which is no file")
    arrays = load_arrays(file)
    if arrays is None or not {"x_adv", "y"} <= arrays.keys():
        raise ValueError(f"expected an .npz with x_adv (N, C, H, W) and y (N,), got {file}")
    x_adv, y = arrays["x_adv"], arrays["y"]
    numbers = x_adv.dtype.kind in "fiu" and x_adv.size > 0
    least, most = (float(x_adv.min()), float(x_adv.max())) if numbers else (math.nan, math.nan)
    if x_adv.dtype.kind != "f" or x_adv.ndim != 4 or not (least >= -_ROUNDING and most <= 1 + _ROUNDING):
        found = f" from {least:g} to {most:g}" if numbers else ""
        raise ValueError(f"expected x_adv (N, C, H, W) of floats in [0, 1], got {x_adv.dtype} {x_adv.shape}{found}")
    if y.dtype.kind not in "iu" or y.shape != x_adv.shape[:1] or y.min() < 0:
        raise ValueError(f"expected y ({len(x_adv)},) of labels from 0 on, got {y.dtype} {y.shape}")
    return torch.from_numpy(x_adv).float(), torch.from_numpy(y).long()


def _judge(arguments: argparse.Namespace) -> None:
    x_adv, y = _adversarial(arguments.file)
    model = open_model(
        arguments.model, network=arguments.network, registry_root=arguments.registry_root, device=arguments.device
    )
    if (num := num_logits(model, x_adv[:1].to(arguments.device))) <= int(y.max()):
        raise ValueError(f"expected a model of at least {int(y.max()) + 1} classes, as the labels ask for, got {num}")
    with evaluating(model):
        predicted = torch.cat([predict(model, part.to(arguments.device)).cpu() for part in torch.split(x_adv, 256)])
    print(f"accuracy on {arguments.file}: {Accuracy.of(int((predicted == y).sum()), len(y))}")


def _compare(arguments: argparse.Namespace) -> None:
    ours, theirs = (path.parent if path.is_file() else path for path in (arguments.candidate, arguments.control))
    candidate, control = Evaluation.load(ours), Evaluation.load(theirs)
    clean, paired = (paired_gain(ours, theirs, what) for what in ("clean", "union"))
    verdict = promotion_verdict(candidate, control, candidate.audit, paired=paired)
    for name, gain in (("clean", clean), ("union", paired)):
        if gain:
            print(f"{name}: candidate minus control {gain}")
    if verdict.gain:
        print(verdict.statement)
    if verdict.allowed:
        print("promotion: allowed, if the control is a ReLU network of the candidate's architecture")
    else:
        print("promotion: refused\n  " + "\n  ".join(verdict.reasons))


def _confusion(arguments: argparse.Namespace) -> None:
    print(confusion_table(num_examples=arguments.num_examples, budget=arguments.budget))


if __name__ == "__main__":
    sys.exit(main())
