"""How every command starts and how it ends: flags, logging, exit codes.

0    done
2    the user's mistake: one line with the value, the rule and the remedy; again would not help
75   interrupted, by SIGTERM, a lost peer or the watchdog: the same command goes on (EX_TEMPFAIL)
128+ ended by a signal, whose number is added: 134 jax aborted, 137 SIGKILL, 143 SIGTERM before this
     program could answer it. As 75
1    anything else, with a traceback: again may help, but not often

`launch/local.sh` acts on them, and so should whatever else starts commands.
"""

import logging as python_logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable

import jax
from absl import flags, logging

from mmdit_jax import hosts

_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "",
    "Folder in which compiled programs are kept for the next start, or off; empty: "
    "JAX_COMPILATION_CACHE_DIR, or ~/.cache/mmdit_jax/compiled.",
)

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_RESUME = os.EX_TEMPFAIL

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OURS = tuple(os.path.join(_ROOT, d) + os.sep for d in ("mmdit_jax", "data_pipelines", "configs"))


def run(
    main: Callable[[list[str]], int | None], *, positional: int = 0, passed_on: str = ""
) -> None:
    """Parses flags, runs `main(argv)` and leaves the process with the right exit code.

    `positional` words that are no flags are passed on to `main`, any more are refused. Words that
    begin with `passed_on`, if that is given, are flags of another command and passed on too.

    A `ValueError` or an `OSError` about a path that our own code raises is the user's mistake and
    ends with one line. The same types raised inside a library are our mistake and keep their
    traceback.
    """
    _set_up_logging()
    if any(word.lstrip("-") in ("h", "help", "helpfull") for word in sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
        sys.exit(EXIT_OK)
    others = [word for word in sys.argv[1:] if passed_on and word.startswith(passed_on)]
    own = [word for word in sys.argv if word not in others]
    try:
        if "config" in flags.FLAGS:
            check_config(own[1:])
        argv = flags.FLAGS(own)
    except flags.Error as error:
        _leave(EXIT_USER, f"error: {_one_line(error)}  (--help lists every flag)")
    except (ValueError, TypeError, OSError) as error:
        _leave(EXIT_USER, f"error: {_one_line(error)}")
    if len(argv) > 1 + positional:
        word = argv[1 + positional]
        _leave(EXIT_USER, f"error: {word!r} is not a flag; flags are written --name=value")
    _keep_compiled_programs()
    try:
        code = main([*argv, *others]) or EXIT_OK
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if not _raised_by_us(error):
            traceback.print_exc()
            _leave(EXIT_FAILURE)
        who = f"{hosts.this_process()}: " if hosts.joined() else ""
        _leave(EXIT_USER, f"error: {who}{_one_line(error)}")
    except KeyboardInterrupt:
        _leave(EXIT_FAILURE, "interrupted")
    except hosts.PeerLost as error:
        _leave(EXIT_RESUME, f"error: {_one_line(error)}")
    except Exception as error:
        traceback.print_exc()
        hosts.end_if_peer_lost(error)
        _leave(EXIT_FAILURE)
    _leave(code)


def _raised_by_us(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(_OURS)


def _set_up_logging() -> None:
    """Our own lines at INFO, and of the libraries only what they warn about, in one line each.

    Orbax logs the same failure from every one of its threads, with tracebacks of 100 lines.
    """

    def wanted(record: python_logging.LogRecord) -> bool:
        if os.path.abspath(record.pathname).startswith(_OURS):
            return True
        record.msg, record.args = record.getMessage().split("\n")[0][:300], ()
        record.exc_info = record.exc_text = None
        return record.levelno >= python_logging.WARNING

    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.addFilter(wanted)
    handler.setFormatter(
        python_logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%m-%d %H:%M:%S")
    )


def _keep_compiled_programs() -> None:
    """Runs that are interrupted start often, and most of the start of a large one is compiling."""
    chosen = _COMPILATION_CACHE.value
    if chosen == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif chosen or not jax.config.jax_compilation_cache_dir:
        folder = os.path.abspath(chosen or os.path.expanduser("~/.cache/mmdit_jax/compiled"))
        jax.config.update("jax_compilation_cache_dir", folder)


def run_programs_in_this_thread() -> None:
    """On CPU, and before the devices are asked for; for commands that train.

    A step's temporaries are allocated by the thread that runs it. The heap of the first thread
    keeps what is freed (GLIBC_TUNABLES, launch/venv.sh); in any other, arrays of over 64 MB are new
    pages in every step.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def check_config(words: list[str]) -> None:
    """Loads the config file and checks the names of its overrides, before ml_collections does.

    Its own errors are long, come late, and do not list the known keys.

    Raises:
        ValueError: no such file, or an unknown key; whatever the file raises about its arguments.
    """
    values = {}
    for i, word in enumerate(words):
        name, has_value, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name.split(".")[0] == "config":
            values[name] = value if has_value else "".join(words[i + 1 : i + 2])
    if "config" not in values:
        return
    path, _, argument = values.pop("config").partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"--config={path} is not a file; for example --config=configs/shapes.py")
    config = runpy.run_path(path)["get_config"](argument)
    for name in (name.removeprefix("config.") for name in values):
        level, known = "", config
        for part in name.split("."):
            if not hasattr(known, "keys") or part not in known:
                names = ", ".join(sorted(known)) if hasattr(known, "keys") else "none"
                raise ValueError(
                    f"unknown config key {name!r}; the known keys of config{level} are {names}"
                )
            level, known = f"{level}.{part}", known[part]


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


def _leave(code: int, message: str = "") -> None:
    """Ends the process; with several processes, without waiting for peers that may be stuck."""
    if message:
        print(message, file=sys.stderr)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_OK and jax.distributed.is_initialized():
        # A normal exit would wait minutes in the shutdown barrier for hosts that are still running.
        os._exit(code)
    sys.exit(code)
