"""The command line.

Only the parser of the given command is built; help imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmworks.commands.table import COMMANDS, STAGE_USAGE, Command, format_commands

if TYPE_CHECKING:
    from llmworks.runtime.stages import Stage

HELP = """\
llmworks: one workshop for the whole life cycle of a language model

usage: llmworks COMMAND ...

{commands}

single stages: llmworks {usage}
{stages}

A MODEL or ARTIFACT is a path, a name in the workspace (quickstart/merged), asset:NAME, hf:ORG/NAME, gguf:FILE,
url:URL#sha256=HEX or http://HOST:PORT/v1#MODEL. See `llmworks COMMAND --help`.
Exit codes: 0 success, 1 a check failed, 2 invalid input, 3 a missing dependency or a failing server or worker,
4 an error of llmworks itself (--debug shows where), 130 interrupted.
"""

WHAT_TO_DO = {
    errno.EEXIST: "a file is where a directory is needed; choose another path",
    errno.ENOTDIR: "a file is where a directory is needed; choose another path",
    errno.EISDIR: "name a file, not a directory",
    errno.EACCES: "choose a path that you may write to",
    errno.EROFS: "choose a path that you may write to",
    errno.ENOENT: "choose a path in a directory that exists and that you may write to",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    from llmworks.commands import launch
    from llmworks.core.errors import LlmworksError

    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("LLMWORKS_DEBUG"))
    words = [word for word in words if word != "--debug"]
    prepare_output()
    if argv is None:
        signal.signal(signal.SIGTERM, _interrupt)
        if os.environ.get("RANK", "0") != "0":  # only rank 0 prints the result
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = launch.launch_if_distributed(words)
        return dispatch(words) if code is None else code
    except LlmworksError as error:
        if launch.is_reported_by_launcher(error):
            return launch.LOST_EXIT_CODE
        print(f"llmworks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmworks: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota
            print(
                f"llmworks: {error.filename or 'the disk'}: no space left; free some (llmworks gc) and run the same"
                " command again",
                file=sys.stderr,
            )
            return 3
        advice = f"; {WHAT_TO_DO[error.errno]}" if error.errno in WHAT_TO_DO else ""
        print(f"llmworks: {error.filename or 'the system'}: {error.strerror or error}{advice}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        if debug:
            raise
        text = ascii(error.object[max(0, error.start - 20) : error.end + 20])
        print(f"llmworks: {text}: is not valid Unicode; rename the file, or correct the text", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        print(f"llmworks: {describe_internal_error(error)}", file=sys.stderr)
        return 4


def prepare_output() -> None:
    """Let every text be printed: characters that the terminal cannot show are escaped, closed streams discard."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def describe_internal_error(error: Exception) -> str:
    """Describe an unexpected error in one line: type, message and the innermost line of llmworks."""
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "llmworks" in frame.filename]
    where = f" in {frames[-1].filename.rpartition('llmworks/')[2]}:{frames[-1].lineno}" if frames else ""
    message = " ".join(str(error).split())[:300]
    return (
        f"an error of llmworks itself{where}: {type(error).__name__}{f': {message}' if message else ''}; the same"
        " command with --debug shows the traceback"
    )


def _interrupt(number: int, frame: object) -> None:
    """Handle SIGTERM like Ctrl-C: workers are stopped, drafts removed."""
    raise KeyboardInterrupt


def dispatch(words: list[str]) -> int:
    """Find and run the command."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"llmworks {version('llmworks')}")
        return 0
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), "")
    beside = (
        len(words) > 1 and name == words[0] and ".".join(words[:2]) in _get_stages()
    )  # `merge adapter` beside `merge`
    if not name or beside:
        return _run_stage(words)
    command = importlib.import_module(f"llmworks.commands.{Command.get_module_name(name)}")
    parser, rest = command.build_parser(), words[len(name.split()) :]
    # options may stand between positionals; argparse does not allow that with subcommands
    args = parser.parse_args(rest) if name == "assets" else parser.parse_intermixed_args(rest)
    command.handle(args)
    return 0


def help_text() -> str:
    """Return the text of `llmworks --help`: commands by group, then all public stages."""
    groups = dict.fromkeys(command.group for command in COMMANDS.values())
    stages = "\n".join(
        f"  {name.replace('.', ' '):<23} {stage.summary}"
        for name, stage in sorted(_get_stages().items())
        if not stage.internal
    )
    commands = "\n\n".join(f"{group}\n{format_commands(group)}" for group in groups)
    return HELP.format(commands=commands, usage=STAGE_USAGE, stages=stages)


def _get_stages() -> dict[str, Stage]:
    from llmworks.runtime.stages import STAGES

    return STAGES


def _run_stage(words: list[str]) -> int:
    """Run `llmworks GROUP STAGE ...`: the stage named by the first two words, or by the first alone."""
    from llmworks.runtime.resolve import resolve_stage
    from llmworks.runtime.stages import get_stages

    known = get_stages()
    both = ".".join(words[:2]).replace("-", "_")
    name, rest = (both, words[2:]) if both in known else (words[0], words[1:])
    if name not in known:
        return _report_unknown(words)
    from llmworks.commands import stage

    found = resolve_stage(name)
    stage.handle(found, stage.parse(found, rest))
    return 0


def _report_unknown(words: list[str]) -> int:
    """Print help on a group, or suggest what an unknown command may have meant."""
    import difflib

    from llmworks.runtime.names import find_stage
    from llmworks.runtime.stages import get_stages

    known = {name.replace(".", " "): row.summary for name, row in get_stages().items() if not row.internal}
    known |= {name: command.summary for name, command in COMMANDS.items() if " " in name}
    group = sorted(name for name in known if name.split()[0] == words[0])
    if group and words[1:] in ([], ["-h"], ["--help"]):
        rows = "\n".join(f"  {name:<20} {known[name]}" for name in group)
        usage = STAGE_USAGE.removeprefix("GROUP ")
        print(f"usage: llmworks {words[0]} {usage}\n\n{rows}\n\nSee `llmworks {group[0]} --help`.")
        return 0
    typed = " ".join(words[:2] if group else [w for w in words[:2] if not w.startswith("-")])
    renamed = find_stage(typed.replace(" ", "."), get_stages()).replace(".", " ")
    near = [renamed] if renamed else difflib.get_close_matches(typed, known, n=1, cutoff=0.75)
    if not near and not group:
        typed = words[0]
        groups = {name.split()[0] for name in known}
        near = difflib.get_close_matches(typed, [*COMMANDS, *groups, "--version", "--help"], n=1)
        near = [name for name in known if name.split()[-1] == typed] or near  # `sft` without its group
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"the group has {', '.join(group)}"
        if group
        else "see llmworks --help"
    )
    print(f"llmworks: unknown command {typed!r}, {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
