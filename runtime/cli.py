"""The command line: `tritium generate`, `chat`, `train`, `verify`, `warmup`, `models`, `tune`, `bench`."""

import argparse
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from .errors import Parser, TritiumError, complain, is_first_process

VERIFY_IDS = 48  # tokens, where a checkpoint has no tokenizer
VERIFY_PROMPT = (
    "The numbers of a fast path must be those of a slow one. Here both read the same sentence, word by word, layer by "
    "layer, and whoever differs is named."
)


def _parser() -> Parser:
    parser = Parser(prog="tritium", description="Run Qwen and MobileLLM models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    source = Parser(add_help=False)
    where = source.add_argument_group("model (the bundled one, where none is named)")
    where.add_argument("--model", metavar="FAMILY", help="a family, such as qwen3 (see `tritium models`)")
    where.add_argument("--size", help="a size of that family, such as 0.6B; the family's default where absent")
    where.add_argument("--variant", help="base, instruct, reasoning or chat; the family's default where absent")
    where.add_argument("--checkpoint", metavar="DIR_OR_HUB_ID", help="a checkpoint folder or hub repository instead")
    where.add_argument("--device", help="cpu, cuda, cuda:1 ...; the GPU where there is one")
    where.add_argument("--dtype", default="auto", help="bfloat16, float16, float32, checkpoint; auto: float32 on a CPU")
    where.add_argument("--backend", default="auto", help="auto, triton or torch")
    where.add_argument("--quantise", metavar="SCHEME", help="int8 or int4: store the weights in as many bits")
    where.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="another value for a key of config.json (repeatable)",
    )

    sampling = Parser(add_help=False)
    how = sampling.add_argument_group("sampling (the checkpoint's own defaults, where not given)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (generate 100, chat 512)")
    how.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token always")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens; 0: all")
    how.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach P together")
    how.add_argument("--seed", type=int, help="the same seed gives the same text")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    how.add_argument("--stream", action="store_true", help="print the text as it comes")
    how.add_argument("--stats", action="store_true", help="say on stderr what loading, first token and decoding took")

    generate = commands.add_parser("generate", parents=[source, sampling], help="continue a prompt, or a file of them")
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the text to continue")
    asked.add_argument(
        "--prompts", metavar="FILE.jsonl", help='many at a time: a line each, {"prompt": "..."} or {"messages": [...]}'
    )
    generate.add_argument("--out", metavar="FILE", help="where the answers to --prompts go, a line each (the output)")
    generate.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="share every layer between the N processes that torchrun started",
    )
    chat = commands.add_parser("chat", parents=[source, sampling], help="talk to a model")
    chat.add_argument("--prompt", help="answer this one message and end; otherwise a conversation on the terminal")
    chat.add_argument("--system", help="the system message")
    chat.add_argument("--no-thinking", action="store_true", help="ask Qwen3 for an answer without reasoning")
    train = commands.add_parser("train", help="train a model as a YAML file says")
    train.add_argument("config", metavar="CONFIG.yaml", help="what to train, on what, and how")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the output folder")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key, such as optimizer.learning_rate=3.0e-4 (repeatable)",
    )
    verify = commands.add_parser("verify", parents=[source], help="check the Triton kernels on a model's own weights")
    verify.add_argument(
        "--transformers",
        metavar="DIR_OR_HUB_ID",
        help="a model of transformers: eager, accelerated, and as our decoder",
    )
    verify.add_argument("--prompt", default=VERIFY_PROMPT, help="the text that both paths read")
    verify.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="greedy tokens to compare (16)")
    verify.add_argument("--plot", metavar="FILE.png", help="draw the error by depth, both paths")
    warmup = commands.add_parser("warmup", parents=[source], help="compile a model's kernels before they are needed")
    warmup.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="batch sizes, one or more (1)")
    warmup.add_argument("--context", type=int, metavar="N", help="the longest sequence (8192, or the model's context)")
    commands.add_parser("models", help="list families and sizes")
    commands.add_parser("tune", add_help=False, help="find this GPU's launch configurations (see `tune --help`)")
    commands.add_parser("bench", add_help=False, help="a model's speed beside its floor here (see `bench --help`)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 1 where a verification fails, 2 for a mistake, 130 when interrupted."""
    _usable_streams()
    try:
        options, rest = _parser().parse_known_args(arguments)
        if options.command in ("tune", "bench"):
            return _benchmark(options.command, rest)
        if rest:
            _parser().error(f"unrecognized arguments: {' '.join(rest)}")
        commands = {"generate": _generate, "chat": _chat, "train": _train, "verify": _verify}
        code = {**commands, "warmup": _warmup, "models": _models}[options.command](options)
        sys.stdout.flush()
        return code or 0
    except TritiumError as error:
        complain(f"tritium: error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left; Python would complain again while closing it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk behind the output, above all
        print(f"tritium: error: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _usable_streams() -> None:
    """Standard streams that were closed become empty ones; characters that an output cannot show become `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the process's whole life
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _generator(options: argparse.Namespace, mesh: Any = None) -> Any:
    # Wrong options must not cost the loading of a model first.
    from .generation import SamplingOptions

    given = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    SamplingOptions(**{name: getattr(options, name) for name in given if getattr(options, name) is not None})
    from .text import TextGenerator

    start = time.perf_counter()
    generator = TextGenerator(*_load(options, mesh))
    options.load_seconds = time.perf_counter() - start
    return generator


def _name(options: argparse.Namespace) -> str:
    """What `load` takes for the model that was named, the bundled one where none was."""
    if options.checkpoint is not None and (options.model is not None or options.size is not None):
        raise TritiumError("give either --checkpoint or --model and --size, not both")
    for name in ("size", "variant"):
        if getattr(options, name) is not None and options.model is None:
            raise TritiumError(f"--{name} needs --model, the family that it is a {name} of")
    if options.checkpoint == "":
        raise TritiumError("--checkpoint is empty: give a folder or a hub id")
    if options.model is not None:
        from .registry import get_family

        family = get_family(options.model)
        return f"{family.name}:{family.size_name(options.size)}"
    from .loading import BUNDLED

    return BUNDLED if options.checkpoint is None else str(options.checkpoint)


def _load(options: argparse.Namespace, mesh: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) of the model that was named, the bundled one where none was; of a mesh of processes, each
    gets its part of the model.
    """
    name = _name(options)
    from .loading import load

    chosen = {key: getattr(options, key) for key in ("variant", "device", "dtype", "backend", "quantise")}
    chosen["overrides"] = dict(map(_override, options.override))
    if mesh is not None:  # a model that is shared out may be too large for one device
        if options.quantise is not None:
            raise TritiumError("--quantise: not with --tensor-parallel; leave one of them out")
        chosen["device"] = "cpu"
        if mesh.device.type != "cpu" and options.dtype == "auto":
            chosen["dtype"] = "checkpoint"
    model, tokenizer, _ = load(name, progress=_is_watched(), **chosen)
    if mesh is not None:
        from .parallel.tensor import split_model

        split_model(model, mesh.index("tensor"), mesh.size("tensor"), mesh.group("tensor"))
        model.to(mesh.device)
    return model, tokenizer


def _is_watched() -> bool:
    return sys.stderr.isatty() and is_first_process()


def _override(text: str) -> tuple[str, Any]:
    """KEY=JSON."""
    key, equals, value = text.partition("=")
    try:
        if key and equals:
            return key, json.loads(value)
    except ValueError:
        pass
    raise TritiumError(f"--override: must be KEY=JSON, such as rope_theta=1000000.0, got {text!r}")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "seed", "stop")
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    return {"stream": True, **limit, **{name: getattr(options, name) for name in names}}


def _show(pieces: Iterable[str], options: argparse.Namespace, generator: Any) -> str:
    """Prints a text, piece by piece or whole, with what it took where that was asked for; returns the text."""
    text = _print(pieces, options)
    if options.stats and is_first_process():
        sys.stdout.flush()
        print(f"model loaded in {options.load_seconds:.2f} s; {generator.last_stats}", file=sys.stderr)
    return text


def _print(pieces: Iterable[str], options: argparse.Namespace) -> str:
    if options.stream:
        shown = []
        for piece in pieces:
            print(piece, end="", flush=True)
            shown.append(piece)
        print()
        return "".join(shown)
    from tqdm import tqdm

    text = "".join(tqdm(pieces, desc="Generating", unit=" tokens", delay=1, leave=False, disable=not _is_watched()))
    print(text)
    return text


def _generate(options: argparse.Namespace) -> None:
    from .parallel.mesh import launched, started

    if options.prompts is not None:
        return _generate_many(options)
    if options.out is not None:
        raise TritiumError("--out: needs --prompts, the file whose answers it is for")
    count = options.tensor_parallel
    if count < 1 or launched() not in (0, count):
        wanted = (
            f"must be 1 or more, got {count}" if count < 1 else f"torchrun started {launched()} processes, not {count}"
        )
        raise TritiumError(f"--tensor-parallel: {wanted}")
    with started({"data": 1, "tensor": count}, options.device) as mesh, _one_voice():
        generator = _generator(options, mesh)
        pieces = generator.generate(options.prompt, **_sampling(options))
        if options.stream:
            print(options.prompt, end="", flush=True)
            _show(pieces, options, generator)
        else:
            _show((piece for part in ((options.prompt,), pieces) for piece in part), options, generator)


def _generate_many(options: argparse.Namespace) -> None:
    if options.stream or options.tensor_parallel != 1:
        raise TritiumError(f"--prompts: not with {'--stream' if options.stream else '--tensor-parallel'}; leave it out")
    out = None if options.out is None else Path(options.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise TritiumError(f"--out: {out}: give a file in a folder that exists")
    from .engine.engine import Engine
    from .engine.prompts import SAMPLING, read_prompts, submit, write

    lines = read_prompts(Path(options.prompts))  # what is wrong in it must not cost the loading of a model
    generator = _generator(options)
    engine = Engine(generator.model, generator.tokenizer)
    usual = {name: getattr(options, name) for name in SAMPLING}
    answers = submit(engine, generator, lines, usual, options.stop)
    with nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8") as file:
        took = write(engine, answers, file)
    if options.stats:
        print(f"model loaded in {options.load_seconds:.2f} s; {took}", file=sys.stderr)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes that say the same, only the first is heard."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _chat(options: argparse.Namespace) -> None:
    generator = _generator(options)
    thinking = False if options.no_thinking else None
    ask = {**_sampling(options), "enable_thinking": thinking}
    if options.prompt is not None:
        _show(generator.chat(options.prompt, system=options.system, **ask), options, generator)
        return
    conversation = [] if options.system is None else [{"role": "system", "content": options.system}]
    has_template = generator.tokenizer.chat_template is not None
    if options.system is not None and not has_template:
        raise TritiumError("--system: this checkpoint has no chat template to put it in")
    while True:
        try:
            message = input("> ")
        except (EOFError, RuntimeError):  # the latter where standard input is closed
            print()
            return
        if not message.strip():
            continue
        conversation.append({"role": "user", "content": message})
        answer = _show(generator.chat(conversation if has_template else message, **ask), options, generator)
        conversation.append({"role": "assistant", "content": answer})


def _verify(options: argparse.Namespace) -> int:
    # Wrong options must not cost the loading of a model, and no plot the verification before it.
    if options.max_new_tokens < 1:
        raise TritiumError(f"--max-new-tokens: must be 1 or more, got {options.max_new_tokens}")
    if options.backend == "torch":
        raise TritiumError("--backend torch: verify compares both paths; leave --backend out")
    if options.transformers is not None:
        return _verify_transformers(options)
    if options.plot is not None:
        path = Path(options.plot)
        if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
            raise TritiumError(f"--plot: {path}: give a .png file in a folder that exists")
        if importlib.util.find_spec("matplotlib") is None:
            raise TritiumError("--plot needs matplotlib: pip install matplotlib")
    import torch

    from ..kernels.launch import INSTALLED, INTERPRETED, obstacle

    device = "cpu" if INTERPRETED or str(options.device).startswith("cpu") else "cuda"
    if (why := obstacle(torch.device(device))) is not None:
        how = "; with TRITON_INTERPRET=1 in the environment and --device cpu the kernels run on the CPU, slowly"
        raise TritiumError(f"verify cannot run here: {why}{how if INSTALLED else ''}")
    model, tokenizer = _load(options)
    from .verify import plot, table, verify

    if tokenizer is None:  # any ids do
        size = model.config.vocab_size
        tokens = [(7 * index * index + 3) % size for index in range(min(VERIFY_IDS, model.config.context_length // 2))]
    else:
        tokens = tokenizer.encode(options.prompt)
    report = verify(model, tokens, options.max_new_tokens)
    print(table(report))
    if options.plot is not None:
        plot(report, options.plot)
    return int(bool(report.problems))


def _verify_transformers(options: argparse.Namespace) -> int:
    others = ("model", "size", "variant", "checkpoint", "quantise", "override", "plot")
    if given := [f"--{name}" for name in others if getattr(options, name)]:
        raise TritiumError(f"{given[0]}: not with --transformers, which names the model; leave one of them out")
    from .dropin.verify import table, verify

    report = verify(options.transformers, options.prompt, options.max_new_tokens, options.device, options.dtype)
    print(table(report))
    return int(bool(report.problems))


def _warmup(options: argparse.Namespace) -> None:
    if options.backend == "torch":
        raise TritiumError("--backend torch: warmup compiles the Triton kernels; leave --backend out")
    if options.model is not None and options.override:
        raise TritiumError("--override: needs --checkpoint, whose config.json has the key")
    from .checkpoint import read_spec
    from .loading import resolve_checkpoint
    from .registry import get_family
    from .warmup import report, require_kernels

    require_kernels()  # what cannot run here must not cost a download
    name = _name(options)
    if options.model is not None:  # known without its weights
        family = get_family(options.model)
        spec = family.spec(family.size_name(options.size))
    else:
        spec = read_spec(resolve_checkpoint(name, progress=_is_watched()), dict(map(_override, options.override)))
    chosen = {key: getattr(options, key) for key in ("device", "dtype", "quantise")}
    print(report(spec, batches=options.batch, context=options.context, **chosen))


def _train(options: argparse.Namespace) -> int:
    from .training.trainer import train

    return train(options.config, options.set, options.resume)


def _benchmark(command: str, arguments: Sequence[str]) -> int:
    # The command line stands above everything, the benchmarks included: these commands are two of them.
    from ..benchmarks import bench, tune

    return {"tune": tune, "bench": bench}[command].main(list(arguments))


def _models(options: argparse.Namespace) -> None:
    from .summary import model_table

    print(model_table())


if __name__ == "__main__":
    sys.exit(main())
