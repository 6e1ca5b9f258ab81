"""`moelab COMMAND`: finds the command's file and turns the user's mistakes into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from moelab import __version__
from moelab.plugin_faults import ANYTHING
from moelab.printable import LONGEST_MESSAGE, printable

if TYPE_CHECKING:
    from moelab.errors import RunFailure, UserError

# Name -> what `moelab --help` says. The file commands/NAME.py holds `command`, imported when it is run.
COMMANDS = {
    "demo": "Dense Qwen2 -> upcycle -> train variants -> compare, on real text.",
    "train": "Train a model from a config; writes a run folder.",
    "align": "Fine-tune on conversations, learn rewards or preferences, through TRL.",
    "sweep": "Train variants times seeds, then compare them.",
    "experiment": "Run a declared experiment, judge it by its own rule.",
    "runs": "List run folders: state, step, held-out loss, and what differs.",
    "evaluate": "Held-out loss of a checkpoint.",
    "generate": "Continue prompts with a checkpoint, a file of them too.",
    "repurpose": "Make questions with checkable answers of functions' doctests.",
    "synthesise": "Judge answers: right ones to learn from, right against wrong as preferences.",
    "critique": "Let a model revise its answers by principles, and learn from that.",
    "evolve": "Let a model make prompts harder, or more of them.",
    "tag": "Let a model tag the instructions of conversations.",
    "chat": "Talk with a checkpoint in a terminal.",
    "data": "Filter text, drop its copies, account for every document.",
    "upcycle": "Turn a dense checkpoint into one with experts.",
    "surgery": "Grow, split, merge, prune or revive trained experts, or change K.",
    "merge": "Merge checkpoints of one model, expert by expert.",
    "verify": "Compare checkpoints with their checksums, or an upcycled one with its source.",
    "export": "Write a moelab checkpoint as a Hugging Face one.",
    "compare": "Compare runs: a table and an HTML report.",
    "trace": "Write who went where: the experts of every token, layer by layer.",
    "view": "Turn a trace into a page of text coloured by expert.",
    "replay": "Force a trace's routes on a model, and say what changes.",
    "agreement": "How far two traces of the same text agree, by layer and domain.",
    "ablate": "Remove experts or change routes, and say what it costs.",
    "config": "Print what a config comes to, every key there is, or a schema for editors.",
    "plugins": "List every plugin with its options.",
    "new": "Write a package with a router of your own, or another part, that passes the kit.",
    "explain": "Print what each layer of a config is built from, with parameters and FLOPs.",
    "coefficient": "Convert a balance loss's coefficient from one program's convention to another's.",
    "architectures": "Print the table of the shipped model configs.",
    "plan": "Predict the memory and communication of a config on N devices.",
    "doctor": "Tell what this machine has and which expert backends work on it.",
}
SHARED = {"train"}  # what all processes that torchrun started do together; of the others one of them does it
TRAINING = {"train", "align"}  # whose plugins may have a thread that still brings a run's data away
EXIT_USER, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


class LazyGroup(click.Group):
    """Imports a command's file only when that command is asked for: `moelab --help` never sees torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"moelab_tools.commands.{cmd_name}").command
        assert isinstance(command, click.Command), cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f", did you mean '{close[0]}'?" if close else "."
            ctx.fail(f"no command '{args[0]}'{hint} Known: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moelab")
def moelab() -> None:
    """Find out which mixture-of-experts language model is better, and why.

    \b
    Example:
      moelab train configs/train/tiny_moe.yaml run_dir=runs/first
      tensorboard --logdir runs
    """


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 the user's input."""
    from moelab import launcher
    from moelab_tools.left_threads import watch

    code = EXIT_FAILED  # of a mistake of ours, which keeps its traceback
    try:
        code = run(sys.argv[1:])
    finally:
        watch(code, _tell, trains=_command_of(sys.argv[1:]) in TRAINING)
    if launcher.world() > 1:
        launcher.end(code, mistake=code == EXIT_USER and _is_shared(sys.argv[1:]))
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors and warnings go to stderr."""
    from moelab_tools.terminal import guarded

    with guarded():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    if "_MOELAB_COMPLETE" in os.environ:  # a shell asks what Tab offers
        from moelab_tools.completion import use_bash

        use_bash()
    if not _is_shared(arguments) and _told_to_one(arguments):
        return 0
    if _one_of_many():  # which the first of them speaks for
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    teller = logging.NullHandler() if _one_of_many() else _Warnings(logging.WARNING)
    logging.getLogger("moelab").addHandler(teller)
    try:
        moelab.main(arguments, prog_name="moelab", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        vars(error)["message"] = printable(error.message, LONGEST_MESSAGE, keep="\n")  # it quotes what was typed
        if not _one_of_many():
            error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ANYTHING as error:
        return _explain(error)
    finally:
        logging.getLogger("moelab").removeHandler(teller)
    return 0


def _is_shared(arguments: list[str]) -> bool:
    return _command_of(arguments) in SHARED


def _command_of(arguments: list[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _told_to_one(arguments: list[str]) -> bool:
    """Whether this process leaves a command to the first one, which says so; several would write the same files."""
    from moelab import launcher

    if launcher.world() > 1 and not _one_of_many():
        name = next(iter(arguments), "moelab")
        _tell(f"warning: {printable(name)} is done by one of the {launcher.world()} processes that torchrun started")
    return _one_of_many()


def _one_of_many() -> bool:
    """Whether torchrun started this process beside another one that speaks."""
    from moelab import launcher

    return launcher.world() > 1 and launcher.rank() != 0


def _left_to_others(error: UserError | RunFailure) -> bool:
    """Whether another process that torchrun started says this, or has said it: a mistake is heard once."""
    from moelab import launcher
    from moelab.errors import UserError

    if launcher.rank() != 0 and error.left_to_main:
        return True
    return isinstance(error, UserError) and launcher.was_said(str(error))


class _Warnings(logging.Handler):
    """Says what was skipped, cut or assumed in one line each, beside a command's own output."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:  # ends the command, which says it itself
            return
        message = printable(record.getMessage(), LONGEST_MESSAGE, keep="\n")
        _tell(f"{record.levelname.lower()}: {message}")


def _tell(message: str) -> None:
    from moelab_tools.terminal import wrapped

    click.echo(wrapped(message, sys.stderr), err=True)


def _explain(error: BaseException) -> int:
    """One message for what moelab foresaw; anything else is our own fault and keeps its traceback."""
    from moelab.errors import RunFailure, UserError
    from moelab.plugin_faults import broken_package, strangers_fault
    from moelab.shortage import shortage

    if isinstance(error, UserError | RunFailure) and _left_to_others(error):
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    if isinstance(error, UserError):
        _tell(f"error: {error}")
        return EXIT_USER
    if isinstance(error, RunFailure):
        _tell(f"failed: {error}")
        return EXIT_FAILED
    found = shortage(error)
    if found is not None:
        _tell(f"failed: {found}")
        return EXIT_FAILED
    fault = strangers_fault(error) or broken_package(error)
    if fault is not None:
        _tell(f"error: {fault}")
        return EXIT_USER
    raise error


if __name__ == "__main__":
    main()
