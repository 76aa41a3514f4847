"""The command line: `usaf-ext demo | info | quantize | train | eval | export`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from . import _C, __version__
from .errors import UsafError
from .sizes import parse_size
from .train_flags import add_train_flags

_USER_ERRORS = (UsafError, ValueError, TypeError, OSError)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None


def _budget(text: str) -> int | str:
    return text if text == "auto" else _size(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _add_host_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host-budget",
        type=_size,
        default=None,
        metavar="BYTES",
        help="host memory for the experts, e.g. 12GiB; a store that is larger is read from disk (default: no limit)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda or cuda:N (default: auto, a GPU if there is one and this build has kernels for it)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face checkpoint, a store or a run folder")
    parser.add_argument(
        "--format", choices=_C.FORMATS, help="of the experts (default: a store's or run's own, nf4 for a checkpoint)"
    )
    parser.add_argument(
        "--device-budget",
        type=_budget,
        default="auto",
        metavar="BYTES",
        help="page slots plus decode scratch on the device, e.g. 8GiB (default: auto)",
    )
    _add_host_budget(parser)
    _add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="compute dtype (default: the checkpoint's, but float16 on a GPU without bfloat16); float16 trains with "
        "loss scaling",
    )
    parser.add_argument("--originals", default=None, help="folder of the original checkpoint, if a store has moved")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="usaf-ext",
        description="Fine-tune Mixture-of-Experts language models on small GPUs, the original expert weights directly.",
    )
    parser.add_argument("--version", action="version", version=f"usaf-ext {__version__}")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: all)")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fine-tune the shipped checkpoint, prove the result, write report.json")
    demo.add_argument("--out", default="demo_run", help="folder for the run, plots and report (default: demo_run)")
    demo.add_argument("--router", choices=("frozen", "topk"), default="frozen", help="train the router too: topk")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    _add_device(demo)

    info = commands.add_parser("info", help="backends, devices, threads and versions")
    info.add_argument("--check", action="store_true", help="test every op and the pager on every device present")

    quantize = commands.add_parser("quantize", help="write a checkpoint's experts as a quantised store")
    quantize.add_argument(
        "model", metavar="MODEL", help="a Hugging Face checkpoint folder; one in bitsandbytes' NF4 is imported"
    )
    quantize.add_argument("store", metavar="STORE", help="the folder to write")
    quantize.add_argument("--format", choices=_C.FORMATS, default="nf4", help="weight format (default: nf4)")

    train = commands.add_parser("train", help="fine-tune chosen expert neurons (and the router)")
    _add_model_options(train)
    train.add_argument("--data", required=True, nargs="+", metavar="FILE", help=".txt or .jsonl (text or messages)")
    train.add_argument("--eval-data", nargs="+", metavar="FILE", help="held-out files, evaluated before and after")
    train.add_argument("--out", required=True, metavar="DIR", help="run folder: checkpoints, log.jsonl, plots")
    add_train_flags(train)
    train.add_argument("--resume", action="store_true", help="continue the run in --out, bit for bit")

    evaluate = commands.add_parser("eval", help="mean next-token loss on a text")
    _add_model_options(evaluate)
    evaluate.add_argument("--data", required=True, nargs="+", metavar="FILE", help=".txt or .jsonl")
    evaluate.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch (default: 8)")
    evaluate.add_argument("--seq-len", type=_positive, default=256, help="tokens a sequence (default: 256)")

    export = commands.add_parser("export", help="write a run as a plain Hugging Face checkpoint, and verify it")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("out", metavar="OUT", help="the checkpoint folder to write")
    export.add_argument(
        "--base",
        choices=("original", "dequantized"),
        default="original",
        help="original: untrained weights bit for bit the source's; dequantized: what the 4-bit model computes with",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a dequantized export (default: float32)")
    export.add_argument("--originals", default=None, help="folder of the original checkpoint, if it has moved")
    _add_host_budget(export)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a self-test failed (info --check), 2 bad input, 130 interrupted (the run
    was saved)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    command = importlib.import_module(".demo" if arguments.command == "demo" else ".commands", __package__)
    try:
        return getattr(command, arguments.command)(arguments)
    except KeyboardInterrupt:
        return 130
    except _USER_ERRORS as error:
        if arguments.verbose:
            logging.getLogger(__name__).exception("the command failed")
        print(f"usaf-ext {arguments.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
