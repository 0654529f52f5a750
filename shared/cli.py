"""What all commands share: the options that are make variables, and how a user's mistake ends (one line, exit 2)."""

import errno
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import click

from shared.errors import UserError
from shared.resolve import Choice

# diffusers imports bitsandbytes where it is installed, which then asks for an optional package of kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Command = TypeVar("Command", bound=Callable[..., Any])
FULL, CLOSED, MIXED_UP = (
    "free space, or choose another WORK",
    "make it accessible, or choose another WORK",
    "a file is where a folder is wanted, or a folder where a file is; move it away, or name another place",
)
ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL)
ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES), CLOSED)
ADVICE |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), MIXED_UP)
MAKE_VARIABLES = ("DATA", "SET", "CONFIG", "PRESET", "MODEL", "WORK", "STORE", "RUN", "RESUME", "FORMAT", "TO", "FROM",
                  "REPO", "SHARD", "FFMPEG", "PROMPT", "IMAGE", "SHA256", "ROWS", "OUT", "CARD", "GPUS", "DRY_RUN",
                  "PRIVATE")  # fmt: skip
INTERRUPTED = 130  # what shells report for Ctrl-C


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line in place of the traceback of a Ctrl-C; other exceptions keep theirs."""
    if issubclass(kind, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on from here", err=True)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly  # Ctrl-C while a command still loads


class Group(click.Group):
    """A click group whose UserErrors end in one line and exit code 2, and Ctrl-C in one line and 130."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"error: {one_line(error)}; --help explains", err=True)
            sys.exit(2)
        except UserError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(2)
        except OSError as error:
            if error.errno not in ADVICE:
                raise
            place = error.filename or "the output folder"
            click.echo(f"error: {error.strerror}: {place}; {ADVICE[error.errno]}, then run it again", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted; the same command goes on from here", err=True)
            sys.exit(INTERRUPTED)


def one_line(error: click.ClickException) -> str:
    """What is wrong with a command line, with the name that the option has as a make variable."""
    said = " ".join(error.format_message().split()).rstrip(".")
    if not isinstance(error, click.BadParameter) or error.param is None:
        return said
    flag = error.param.opts[0]
    variable = flag.strip("-").upper().replace("-", "_")
    hint = f" (with make: {variable}=...)" if variable in MAKE_VARIABLES else ""
    return f"{flag} is missing{hint}" if isinstance(error, click.MissingParameter) else said + hint


def work_option(command: Command) -> Command:
    """--work: the folder of everything preprocessed."""
    return click.option(
        "--work",
        type=click.Path(path_type=Path),
        default=Path("work"),
        show_default=True,
        help="Folder of shards, index and latent store.",
    )(command)


def config_options(command: Command) -> Command:
    """--preset --config --model --set; the command receives them as one `choice: Choice`."""

    def wrapper(preset: str | None, config: Path | None, model: str | None, set_: str, **rest: Any) -> Any:
        return command(choice=Choice(preset or None, config, model or None, set_), **rest)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    decorated: Any = wrapper
    for option in reversed(
        (
            click.option("--preset", help="A complete config in shared/presets, such as 8gb, 16gb, 24gb, cpu, demo."),
            click.option("--config", type=click.Path(path_type=Path), help="JSON file laid over the preset."),
            click.option(
                "--model",
                help="Short for base_model_name: ti2v-5b, t2v-a14b, i2v-a14b, tiny, a Hub id, a folder, "
                "DIT.safetensors, or HIGH.safetensors,LOW.safetensors.",
            ),
            click.option("--set", "set_", default="", help='Settings laid over all, such as "batch_size=1 seed=3".'),
        )
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
