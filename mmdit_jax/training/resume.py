"""Where a run goes on: from which checkpoint, and from which batch of the data.

What a run has trained on is a pure function of the stream that its checkpoint records: batch sizes
that it had before, batches that were left out, the step at which another data set began. So the
same command again goes on with the same stream, whatever was asked for once and forgotten since.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from mmdit_jax.config import Config
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Manifest
from mmdit_jax.training import workdir as workdir_lib
from mmdit_jax.training.checkpoint import Checkpoints, Restored
from mmdit_jax.training.integrity import DamagedError
from mmdit_jax.training.state import StatePlan

MODES = ("auto", "must", "never")


class Request(NamedTuple):
    """What the user asks for.

    Attributes:
        mode: "auto" (a checkpoint if there is one), "must", "never", or a step.
        rollback_to: a step to go back to, once; None: not at all.
        skip: (a, b): batches a to b - 1 are left out after the rollback.
        allow_batch_change: the batch size may differ from what it was.
        allow_data_change: the data set may differ from what it was.
    """

    mode: str = "auto"
    rollback_to: int | None = None
    skip: tuple[int, int] | None = None
    allow_batch_change: bool = False
    allow_data_change: bool = False


def parse(
    mode: str, rollback_to: int, skip: str, *, allow_batch_change: bool, allow_data_change: bool
) -> Request:
    """Reads the flags; `rollback_to` is -1 and `skip` empty when they are not given.

    Raises:
        ValueError: a value that is none of those that are known.
    """
    if mode not in MODES and not mode.isdecimal():
        raise ValueError(f"--resume={mode} must be one of {', '.join(MODES)}, or a step")
    batches = None
    if skip:
        first, _, last = skip.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(
                f"--skip_batches={skip} must be a:b with a < b; batches a to b - 1 are left out"
            )
        if rollback_to < 0:
            raise ValueError("--skip_batches needs --rollback_to=STEP: the step to go back to")
        batches = int(first), int(last)
    if rollback_to >= 0 and mode != "auto":
        raise ValueError(f"--rollback_to={rollback_to} and --resume={mode} exclude each other")
    return Request(
        mode,
        rollback_to if rollback_to >= 0 else None,
        batches,
        allow_batch_change,
        allow_data_change,
    )


class Stream(NamedTuple):
    """Which batches a run takes, and took before: what a `Loader` is to be given.

    Attributes:
        batch_sizes: of each bucket, from the step on that the checkpoint is of.
        earlier: ((until step, batch sizes before), ...).
        skips: ((a, b), ...): batches that are left out.
        origin: step at which the data set took the place of another.
        samples: trained on before `origin`.
        rollbacks: ((step, a, b), ...): those that were asked for and are done.
    """

    batch_sizes: tuple[int, ...]
    earlier: tuple[tuple[int, tuple[int, ...]], ...] = ()
    skips: tuple[tuple[int, int], ...] = ()
    origin: int = 0
    samples: int = 0
    rollbacks: tuple[tuple[int, int, int], ...] = ()

    def loader(self, loader: Loader) -> Loader:
        """The loader, following this stream."""
        return loader.following(earlier=self.earlier, skips=self.skips, origin=self.origin)


def _stream(meta: Mapping[str, Any]) -> Stream:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Stream(**{name: tuples(value) for name, value in meta["stream"].items()})


class Start(NamedTuple):
    """Where a run goes on: a state that was restored (None: a fresh one) and its stream."""

    state: Any
    stream: Stream


def start(
    checkpoints: Checkpoints,
    plan: StatePlan,
    request: Request,
    *,
    workdir: str,
    config: Config,
    loader: Loader,
) -> Start:
    """Restores what the request asks for, after checking that it is of this run.

    Raises:
        ValueError: there is no such checkpoint, none that is good, or it is another run's.
    """
    rolling_back = request.rollback_to is not None and not _is_done(checkpoints, request)
    steps = _candidates(checkpoints, request, rolling_back)

    def check(meta: Mapping[str, Any]) -> None:
        if "stream" not in meta:
            raise ValueError(
                f"{workdir} holds weights without a training state; give another --workdir, and "
                f"start from these with --config.init_from={workdir}"
            )
        workdir_lib.check_identity(
            meta["identity"],
            config,
            loader.manifest,
            workdir=workdir,
            allow_batch_change=request.allow_batch_change,
            allow_data_change=request.allow_data_change,
        )

    restored = checkpoints.restore_newest(plan, steps, check)
    if restored is None:
        if steps:
            raise ValueError(
                f"{workdir}: no checkpoint is good ({', '.join(checkpoints.set_aside())} were set "
                "aside); put back a copy of one, or train in another --workdir"
            )
        return Start(None, Stream(loader.batch_sizes))
    step = int(restored.state.step)
    stream = _goes_on(restored, step, request, rolling_back, loader)
    for newer in checkpoints.steps():
        if newer > step:
            checkpoints.rename(newer, "rolled_back", f"going back to step {step}, before {newer}")
    return Start(restored.state, stream)


def _is_done(checkpoints: Checkpoints, request: Request) -> bool:
    """Whether the newest checkpoint was saved after the rollback that is asked for.

    A command that is repeated, after a preemption, must not go back once more.
    """
    for step in reversed(checkpoints.steps()):
        try:
            rollbacks = _stream(checkpoints.meta(step)).rollbacks
        except (DamagedError, KeyError):
            continue
        return (request.rollback_to, *(request.skip or (0, 0))) in rollbacks
    return False


def _candidates(checkpoints: Checkpoints, request: Request, rolling_back: bool) -> Sequence[int]:
    """Steps to try, in this order.

    Raises:
        ValueError: nothing is there of what is asked for.
    """
    steps = checkpoints.steps()
    has = f"has {', '.join(map(str, steps)) or 'none'}"
    if request.mode == "never":
        if steps:
            raise ValueError(
                f"--resume=never, but the workdir {has} as checkpoints; give another --workdir"
            )
        return ()
    if rolling_back or request.mode.isdecimal():
        wanted = request.rollback_to if rolling_back else int(request.mode)
        if wanted not in steps:
            raise ValueError(f"there is no checkpoint of step {wanted}, the workdir {has}")
        return (wanted,)
    if not steps and request.mode == "must":
        raise ValueError("--resume=must, but the workdir has no checkpoint; give that of the run")
    if not steps and checkpoints.set_aside():
        raise ValueError(
            f"the workdir has only checkpoints that were set aside "
            f"({', '.join(checkpoints.set_aside())}); put back a copy of one, or start again with "
            "--resume=never"
        )
    return steps[::-1]


def _goes_on(
    restored: Restored, step: int, request: Request, rolling_back: bool, loader: Loader
) -> Stream:
    """The stream of a restored run, with what the request changes of it."""
    stream = _stream(restored.meta)
    before = restored.meta["identity"]["data_fingerprint"]
    if loader.manifest.fingerprint() != before:
        logging.warning("another data set from step %d on, read from its beginning", step)
        stream = Stream(
            loader.batch_sizes,
            origin=step,
            samples=restored.meta["samples"],
            rollbacks=stream.rollbacks,
        )
    elif loader.batch_sizes != stream.batch_sizes:
        logging.warning(
            "batch sizes %s from step %d on, %s before",
            loader.batch_sizes,
            step,
            stream.batch_sizes,
        )
        stream = stream._replace(
            batch_sizes=loader.batch_sizes,
            earlier=(*stream.earlier, (step, stream.batch_sizes)),
        )
    if rolling_back:
        assert request.rollback_to is not None
        number = stream.loader(loader).batch_number(step)
        done = (request.rollback_to, *(request.skip or (0, 0)))
        if request.skip:
            if request.skip[0] < number:
                raise ValueError(
                    f"--skip_batches={request.skip[0]}:{request.skip[1]}: step {step} is already "
                    f"at batch {number}; give {number} or more, or go back further"
                )
            stream = stream._replace(skips=(*stream.skips, request.skip))
        stream = stream._replace(rollbacks=(*stream.rollbacks, done))
        logging.warning("rolled back to step %d, batches left out: %s", step, stream.skips)
    return stream


def meta(config: Config, manifest: Manifest, stream: Stream) -> dict[str, Any]:
    """What is saved with each checkpoint, so that `start` can go on from it."""
    return {"identity": workdir_lib.identity(config, manifest), "stream": stream._asdict()}
