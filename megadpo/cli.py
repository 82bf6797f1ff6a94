"""The command line. What a command needs is imported when it runs, so that help and mistakes come at once."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megadpo.errors import CheckpointError, ConfigError, DataError, MegadpoError
from megadpo.observe.quiet import quiet
from megadpo.options import bench_options, conversion_options, launch_options, plan_options, positive
from megadpo.parallel.ranks import Rank, joined
from megadpo.parallel.stop import ASKING

if TYPE_CHECKING:
    from megadpo.config import Config
    from megadpo.launch import Job
    from megadpo.plan.command import Request
    from megadpo.train.bench import Asked


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line get one line, as all others do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megadpo: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A mistake of the user becomes one line on standard error."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes the overrides only up to the first option after them.
    dashed = [other for other in others if other.startswith("-")]
    if dashed:
        parser.error(f"unknown option {dashed[0]}; settings are given as key=value, without dashes")
    if others and not hasattr(options, "overrides"):
        parser.error(f"unexpected {others[0]!r}")
    if others:
        options.overrides = [*options.overrides, *others]
    try:
        with quiet():
            code: int = options.command(options)
            return code
    except MegadpoError as error:
        if _speaks():
            _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `megadpo schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> Parser:
    parser = Parser(prog="megadpo", description="Preference training of language models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"megadpo {version('megadpo')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: object, text: str, run_file: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        if run_file:
            added.add_argument("run_file", metavar="run.yaml", help="the run file")
            added.add_argument(
                "overrides",
                nargs="*",
                default=[],
                metavar="key=value",
                help="settings that replace those of the run file",
            )
        return added

    train = add("train", _train, "Train, or go on from the run folder's newest checkpoint, then export.")
    train.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a rank died or hung, start again up to N times; not without a newer checkpoint in between",
    )
    add("prepare", _prepare, "Read and tokenise the data ahead of the run.")
    evaluate = add("eval", _eval, "Held-out metrics of a checkpoint.")
    evaluate.add_argument(
        "--checkpoint", metavar="DIR", help="the run folder's newest, or the model itself, where not given"
    )
    evaluate.add_argument(
        "--kl", action="store_true", help="measure the KL to the reference also for an objective that does without one"
    )
    inspect = add("inspect", _inspect, "Draw one group's tokens, or the packed stream of one micro-batch.")
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--group", type=int, metavar="N", help="the group's number, from 0")
    what.add_argument(
        "--batch",
        metavar="[STEP:]NUMBER",
        help="a micro-batch on data rank 0, from 0, of the first step or of STEP (from 1, as in the log)",
    )
    inspect.add_argument("--eval", action="store_true", help="of data.eval, not of data.train")
    inspect.add_argument("--ids", action="store_true", help="print token ids too")
    bench_options(add("bench", _bench, "Measure the speed of a run's steps, without training."))
    _add_conversion(add)
    launch_options(add("launch", _launch, "Train as a SLURM job; on this machine where there is no SLURM."))
    status = add("status", _status, "Step, speed, time left, restarts and job of a run.", run_file=False)
    status.add_argument("run_dir", metavar="RUN_DIR", help="the run folder")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    plan_options(add("plan", _plan, "Memory, time and cost of a run on every grid of GPUs that are not here."))
    score = add("score", _score, "Write a reward model's scores into a data set.", run_file=False)
    score.add_argument("--reward", metavar="MODEL", required=True, help="a reward model's Hugging Face folder")
    score.add_argument("data", metavar="DATA", help="a file, folder or Hub id, of any kind")
    score.add_argument("out", metavar="OUT", help="the .jsonl file to write")
    score.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings of a run file: data, parallel, batch"
    )
    stored = add("checkpoint", _verify, "Look after checkpoints.", run_file=False)
    actions = stored.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "Read every byte of checkpoints and compare with their manifests."
    verify = actions.add_parser("verify", help=text, description=text)
    verify.add_argument("folder", metavar="DIR", help="one checkpoint, or a run folder for all of its checkpoints")
    add("schema", _schema, "Print the JSON schema of a run file, for editors.", run_file=False)
    return parser


def _add_conversion(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`import` and `export`, and the options that they share."""
    into = add("import", _import, "Write a Hugging Face folder as one that any grid starts from.", run_file=False)
    into.add_argument("hf_dir", metavar="HF_DIR", help="the Hugging Face folder")
    into.add_argument("out_dir", metavar="DIR", help="the folder to write; a run file may name it as model.path")
    into.add_argument("--adapter", metavar="PEFT_DIR", help="a PEFT LoRA folder to merge into the weights")
    out = add("export", _export, "Write a run or an imported folder as a Hugging Face folder.", run_file=False)
    out.add_argument(
        "run_dir", metavar="DIR", help="a run folder (its newest checkpoint), one checkpoint, or an imported folder"
    )
    out.add_argument("out_dir", metavar="HF_DIR", help="the folder to write")
    out.add_argument("--checkpoint", metavar="DIR", help="another checkpoint than the run's newest")
    out.add_argument("--max-shard-size-gb", type=positive(float), metavar="GB", help="of each file; 5 where not given")
    for command in (into, out):
        conversion_options(command)


# ---- commands


def _train(options: argparse.Namespace) -> int:
    return _start(_config(options), _train_rank, options.max_restarts)


def _launch(options: argparse.Namespace) -> int:
    from megadpo.launch import slurm

    config = _config(options)
    given = {field.name: getattr(options, field.name) for field in fields(slurm.Request)}
    given = {name: value for name, value in given.items() if value is not None}
    request = slurm.Request(**given | {"sbatch": tuple(options.sbatch or ())})
    here = not slurm.have_slurm() and not options.dry_run
    if here and not {"nodes", "gpus_per_node", "processes_per_node"} & given.keys():
        return _start(config, _train_rank, request.max_restarts)
    slurm.check(config, request)
    if here:
        grid = config.parallel
        replicas = request.world_size // (grid.tensor_model_parallel_size * grid.pipeline_model_parallel_size)
        print(f"no SLURM here (sbatch is not installed): {request.world_size} processes on this machine")
        return _start(
            replace(config, parallel=replace(grid, data_parallel_size=replicas)), _train_rank, request.max_restarts
        )
    if options.dry_run:
        print(f"# {shlex.join(slurm.sbatch_command(config, request))}")
        print((slurm.job_files() / "train.sbatch").read_text(encoding="utf-8"), end="")
        return 0
    print("\n".join(slurm.submitted(config, request, slurm.submit(config, request))))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from megadpo.plan import command, picture, report
    from megadpo.plan.profile import rank_numbers

    dry = "without --dry-run, which looks at one rank of the run file's own grid"
    alone = {name: dry for name in ("gpu", "svg", "price", "top", "all")}
    for name, without in {**alone, "rank": "with --dry-run"}.items():
        given = getattr(options, name)
        if given is not None and given is not False and options.dry_run == (without == dry):
            raise ConfigError(f"--{name}: only goes {without}; leave it out")
    rows = None if options.all else options.top or 15
    data = (options.groups, options.prompt_tokens, options.response_tokens, options.spread)
    request = command.Request(options.gpus, options.gpu or "", options.price, rows, *data)
    if options.dry_run:
        return _dry_run(options, request)
    if options.gpu is None:
        raise ConfigError("--gpu is not given: name the GPU, as in --gpu h100-80gb; only --dry-run goes without")
    found = command.plan(_config(options), request, rank_numbers)
    if options.svg:
        from megadpo.files import write_text

        write_text(Path(options.svg).expanduser(), picture.svg(found))
    print(json.dumps(report.as_json(found), indent=1) if options.json else "\n".join(report.text(found)))
    return 0 if found.found.plans else 1


def _dry_run(options: argparse.Namespace, request: Request) -> int:
    from megadpo.plan.dry_command import dry_run

    found = dry_run(_config(options), request, options.rank or 0)
    print(json.dumps(found.as_json(), indent=1) if options.json else "\n".join(found.lines()))
    return 0


def _status(options: argparse.Namespace) -> int:
    from megadpo.launch.status import read_status, status_lines

    status = read_status(Path(options.run_dir))
    print(json.dumps(asdict(status)) if options.json else "\n".join(status_lines(status)))
    return 0


def _eval(options: argparse.Namespace) -> int:
    return _start(_config(options), partial(_evaluate_rank, options.checkpoint, options.kl))


def _score(options: argparse.Namespace) -> int:
    """The settings are those of a run file that names the model and the data."""
    import yaml

    from megadpo.config.decode import load_config

    folder = tempfile.mkdtemp(prefix="megadpo-score-")
    code = 2
    try:
        settings = {
            "run_dir": f"{folder}/run",
            "model": {"path": options.reward},
            "data": {"train": options.data},
            "objective": {"loss_type": "reward"},
        }
        run_file = Path(folder) / "score.yaml"
        run_file.write_text(yaml.safe_dump(settings))
        config = load_config(run_file, options.overrides)
        code = _start(config, partial(_score_rank, options.out))
        return code
    finally:
        if code in (0, 2, *(128 + signum for signum in ASKING)):
            shutil.rmtree(folder, ignore_errors=True)  # else it has the ranks' logs, with the stacks of those that hung


def _score_rank(out: str, config: Config, rank: Rank) -> int:
    from megadpo.train.rewards import run_scoring

    return run_scoring(config, out, rank)


def _train_rank(config: Config, rank: Rank) -> int:
    from megadpo.train.run import run_training

    return run_training(config, rank)


def _evaluate_rank(checkpoint: str | None, kl: bool, config: Config, rank: Rank) -> int:
    from megadpo.train.run import run_evaluation

    return run_evaluation(config, checkpoint, kl, rank)


def _bench(options: argparse.Namespace) -> int:
    from megadpo.data.synthetic import Lengths
    from megadpo.train.bench import Asked

    given = [options.run_file, *options.overrides]
    given += ["--synthetic"] if options.synthetic else []
    for name in ("steps", "warm_up", *(("prompt", "response", "spread") if options.synthetic else ())):
        given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.sweep:
        return _sweep(options, given)
    config = _config(options)
    lengths = Lengths(options.prompt, options.response, options.spread, config.data.max_length)
    asked = Asked(
        steps=options.steps,
        warm_up=options.warm_up,
        synthetic=lengths if options.synthetic else None,
        trace=options.trace,
        as_json=options.json,
        append=options.append,
        command=f"megadpo bench {shlex.join(given)}",
    )
    # apart from a run's own logs: one may be going on there
    config = replace(config, run_dir=str(Path(config.run_dir) / "bench"))
    return _start(config, partial(_bench_rank, asked))


def _bench_rank(asked: Asked, config: Config, rank: Rank) -> int:
    from megadpo.train.bench import run_bench

    return run_bench(asked, config, rank)


def _sweep(options: argparse.Namespace, given: list[str]) -> int:
    """0 where at least one combination could be measured."""
    from megadpo.sweep import HEAD, cells, combinations, swept

    if joined(os.environ) is not None:
        raise ConfigError("--sweep starts processes of its own for every combination: leave torchrun or srun out")
    if options.trace:
        raise ConfigError("--trace is of one setting: leave --sweep out")
    combinations(options.sweep)
    _config(options)
    given += ["--append", options.append] if options.append else []
    measured = 0
    for number, one in enumerate(swept(given, options.sweep)):
        measured += one.found is not None
        if options.json:
            print(json.dumps(asdict(one)), flush=True)
        else:
            lines = [HEAD, ["---"] * len(HEAD)] if number == 0 else []
            for line in [*lines, cells(one)]:
                print(f"| {' | '.join(line)} |", flush=True)
    return 0 if measured else 1


def _start(config: Config, job: Job, max_restarts: int = 0) -> int:
    from megadpo.launch import RankFailedError, restarted, start
    from megadpo.observe.trackers import check_trackers

    check_trackers(config.log)
    try:
        return restarted(
            lambda: start(config, job, preload=_import_training),
            Path(config.run_dir).expanduser(),
            max_restarts if joined(os.environ) is None else 0,  # torchrun and SLURM start again themselves
            _complain,
        )
    except MegadpoError as error:
        _complain(str(error))
        return error.exit_code
    except RankFailedError as error:
        if str(error):
            print(error.traceback, file=sys.stderr, end="")
            _complain(str(error))
        return error.exit_code


def _import_training() -> None:
    import megadpo.train.run  # noqa: F401


def _prepare(options: argparse.Namespace) -> int:
    from megadpo.data.kinds import wanted
    from megadpo.data.prepare import prepare
    from megadpo.observe.progress import Screen, Terminal
    from megadpo.parallel.watchdog import STACKS, Watchdog, and_then, stacks_on_signal

    config = _config(options)
    screen = Screen(Terminal())
    with Watchdog(config.train.hang_timeout) as watch, stacks_on_signal(STACKS):
        for name, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if sources:
                with screen.task(f"{name}: rows", None) as task:
                    end = partial(watch.slowly, f"bringing {name} to the disk")
                    rows = and_then(task.to, watch.phase(f"tokenising {name}"))
                    store = prepare(sources, config.data, config.model.path, wanted(config), config.batch, rows, end)
                screen.line(f"{name}: {store.folder}")
                for line in store.report.lines():
                    screen.line(f"  {line}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from megadpo.data.kinds import wanted
    from megadpo.data.prepare import prepare
    from megadpo.data.tokenize import SCORED
    from megadpo.data.tokenizer import load_tokenizer
    from megadpo.observe.progress import Terminal
    from megadpo.observe.tokens import group_text

    config = _config(options)
    if options.batch is not None:
        return _inspect_batch(config, options)
    name, sources = ("data.eval", config.data.eval) if options.eval else ("data.train", config.data.train)
    if not sources:
        raise DataError(f"{name} is not given in the run file; name files there, or leave --eval out")
    store = prepare(sources, config.data, config.model.path, wanted(config), config.batch)
    number = options.group or 0
    if not 0 <= number < len(store):
        raise DataError(f"--group {number}: {name} has the groups 0 to {len(store) - 1}")
    group = store.group(number)
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, config.data.chat_template)
    title = f"group {number} of {len(store)}: {group.origin}"
    prompt, responses = group.prompt_ids.tolist(), [ids.tolist() for ids in group.response_ids]
    scored = None if group.marks is None else [((marks & SCORED) > 0).tolist() for marks in group.marks]
    text = group_text(title, prompt, responses, tokenizer.backend.piece, options.ids, scored)
    Terminal().print(text, soft_wrap=True)
    return 0


def _inspect_batch(config: Config, options: argparse.Namespace) -> int:
    from megadpo.inspection import batch_text
    from megadpo.observe.progress import Terminal

    if options.eval:
        raise DataError("--eval: --batch shows the batches of training; leave one of the two out")
    terminal = Terminal()
    terminal.print(batch_text(config, options.batch, options.ids, terminal.width), soft_wrap=True)
    return 0


def _import(options: argparse.Namespace) -> int:
    from megadpo.conversion import Verification, run_import

    return run_import(
        Path(options.hf_dir).expanduser(),
        Path(options.out_dir).expanduser(),
        options.dtype,
        Path(options.adapter).expanduser() if options.adapter else None,
        options.processes,
        Verification(options.verify, options.verify_text, tolerance=options.tolerance),
    )


def _export(options: argparse.Namespace) -> int:
    from megadpo.conversion import ExportOptions, Verification, run_export

    chosen = Path(options.checkpoint).expanduser() if options.checkpoint else None
    return run_export(
        Path(options.run_dir).expanduser(),
        Path(options.out_dir).expanduser(),
        ExportOptions(chosen, options.dtype, options.max_shard_size_gb, options.processes),
        Verification(options.verify, options.verify_text, tolerance=options.tolerance),
    )


def _verify(options: argparse.Namespace) -> int:
    from megadpo.checkpoint.folder import STATE, checkpoints, damage

    given = Path(options.folder).expanduser()
    folders = [given] if (given / STATE).is_file() else checkpoints(given)
    if not folders:
        raise CheckpointError(f"{given}: is neither a checkpoint nor a run folder with one; give RUN_DIR or step-...")
    damaged = []
    for folder in folders:
        lines = damage(folder)
        print("\n".join(lines) if lines else f"{folder}: whole")
        if lines:
            damaged.append(folder.name)
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(folders)} checkpoints are damaged ({', '.join(damaged)}); a run goes on from the "
            "newest one that is whole"
        )
    return 0


def _schema(options: argparse.Namespace) -> int:
    from megadpo.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


# ---- words


def _config(options: argparse.Namespace) -> Config:
    from megadpo.config.decode import load_config

    return load_config(options.run_file, options.overrides)


def _complain(text: str) -> None:
    print(f"megadpo: error: {text}", file=sys.stderr)


def _speaks() -> bool:
    """Whether to tell of a mistake that every rank meets: under torchrun and SLURM, one on each machine."""
    try:
        rank = joined(os.environ)
    except MegadpoError:
        return True
    return rank is None or rank.local_rank == 0


if __name__ == "__main__":
    sys.exit(main())
