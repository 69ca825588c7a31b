"""Trains a model on a pre-encoded data set.

    python -m mmdit_jax.train --config=configs/shapes.py --workdir=runs/first \\
        --config.data.path=data/shapes

The same command again goes on where the run stopped. Exit code 75 asks for that (SIGTERM, a lost
host, a process that was stuck). `--dry_run` prints what would run, as JSON, without allocating the
model.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from mmdit_jax import command, evaluators, hosts, overview, run, sharding, trained_run
from mmdit_jax import config as config_lib
from mmdit_jax.data.loader import Loader
from mmdit_jax.data.manifest import Bucket
from mmdit_jax.evaluation.sampling import draw_grid
from mmdit_jax.scaling import flops
from mmdit_jax.training import executable, resume
from mmdit_jax.training import state as state_lib
from mmdit_jax.training import workdir as workdir_lib
from mmdit_jax.training.checkpoint import Checkpoints
from mmdit_jax.training.goodput import Account
from mmdit_jax.training.limits import Divergence
from mmdit_jax.training.lock import Lock
from mmdit_jax.training.loop import Hook, train
from mmdit_jax.training.metrics import MetricWriter, kept_going
from mmdit_jax.training.preemption import Preemption
from mmdit_jax.training.profiling import Profile
from mmdit_jax.training.saving import Saver
from mmdit_jax.training.step import compile_train_step, compiled
from mmdit_jax.training.watchdog import Watchdog

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file with its arguments: configs/mmdit.py:depth=24,resolution=256"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and samples go.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan as one JSON object and exit.")
_RESUME = flags.DEFINE_string(
    "resume",
    "auto",
    "auto: from the newest good checkpoint, if there is any; must: refuse to start from scratch; "
    "never: refuse to go on; or a step, newer checkpoints being set aside.",
)
_ROLLBACK_TO = flags.DEFINE_integer(
    "rollback_to", -1, "Go back to the checkpoint of this step, once: repeating it does nothing."
)
_SKIP_BATCHES = flags.DEFINE_string(
    "skip_batches", "", "a:b, with --rollback_to: leave out batches a to b - 1, counted from 0."
)
_ALLOW_BATCH_CHANGE = flags.DEFINE_bool(
    "allow_batch_change", False, "Go on with another batch size, at the next sample."
)
_ALLOW_DATA_CHANGE = flags.DEFINE_bool(
    "allow_data_change", False, "Go on with another data set, from its first batch."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", "", "a:b: traces steps a to b - 1 into workdir/profile, for XProf."
)
_EXECUTABLE = flags.DEFINE_string(
    "executable", "", "File of `mmdit_jax.compile --save`: its steps are loaded, not compiled."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", "", "host:port of process 0; TPU pods and SLURM need none."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.")
_CONNECT_S = flags.DEFINE_integer(
    "connect_s", 0, "Seconds in which all processes must have come; 0: 40, in a pod 300."
)


def dry_run(parts: run.Parts) -> None:
    """Prints parameters, tokens, FLOPs, mesh, bytes per device and the whole config."""
    config = parts.config
    mesh = sharding.abstract_mesh(**config.mesh)
    run.check_batch(config, mesh)
    _, plan = run.plan(parts, mesh)
    buckets = bucket_plan(config)
    plan_json = {
        "parameters": state_lib.count_parameters(plan.abstract.params),
        "tokens": {
            "image": config_lib.image_tokens(config),
            "text": config_lib.text_tokens(config),
        },
        "model_flops_per_step": round(
            sum(bucket["share_of_steps"] * bucket["model_flops_per_step"] for bucket in buckets)
        ),
        "buckets": buckets,
        "mesh": dict(mesh.shape),
        "bytes_per_device": overview.table(plan.abstract, plan.shardings)[1],
        "config": config_lib.to_json(config),
    }
    print(json.dumps(plan_json, indent=2))


def bucket_plan(config: config_lib.Config) -> list[dict[str, Any]]:
    """Steps, tokens and FLOPs of each picture size: those of the data set, or the square."""
    sizes = [Bucket(config.data.resolution, config.data.resolution)]
    counts, batch_sizes = [0], [config.batch_size]
    if config.data.path:
        loader = run.make_loader(config, "train")
        filled = loader.filled_buckets()
        sizes = [loader.manifest.buckets[i] for i in filled]
        counts = [loader.counts[i] for i in filled]
        batch_sizes = [loader.batch_sizes[i] for i in filled]
    steps = [(n or 1) / size for n, size in zip(counts, batch_sizes, strict=True)]
    return [
        {
            "size": str(size),
            "samples": samples,
            "batch_size": batch_size,
            "share_of_steps": step / sum(steps),
            "tokens": {
                "image": config_lib.image_tokens(config, (size.height, size.width)),
                "text": config_lib.text_tokens(config),
            },
            "model_flops_per_step": batch_size
            * flops.train_per_sample(config, (size.height, size.width)),
        }
        for size, samples, batch_size, step in zip(sizes, counts, batch_sizes, steps, strict=True)
    ]


def main(argv: list[str]) -> int:
    """Wires the parts of a run together and trains."""
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/shapes.py")
    config = _CONFIG.value
    for name in ("path", "autoencoder"):
        if config.data[name]:
            config.data[name] = os.path.abspath(config.data[name])
    if _DRY_RUN.value:
        dry_run(run.build(config))
        return command.EXIT_OK
    if not _WORKDIR.value:
        raise ValueError("--workdir is missing; give a directory for this run")
    workdir = os.path.abspath(_WORKDIR.value)

    # Before anything else touches the devices. Then everything that a user may have wrong is
    # checked before the first compilation.
    command.run_programs_in_this_thread()
    hosts.initialize_distributed(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, connect_s=_CONNECT_S.value
    )
    preemption = Preemption()
    request = resume.parse(
        _RESUME.value,
        _ROLLBACK_TO.value,
        _SKIP_BATCHES.value,
        allow_batch_change=_ALLOW_BATCH_CHANGE.value,
        allow_data_change=_ALLOW_DATA_CHANGE.value,
    )
    flags_alike = {f"--{name}": value for name, value in request._asdict().items()}
    hosts.require_same(
        "config",
        {"--workdir": workdir, **flags_alike, **workdir_lib.same_on_all_hosts(config)},
    )
    parts = run.build(config)
    mesh = run.make_mesh(config)
    loader = run.make_loader(config, "train")
    fingerprint = {"the fingerprint of the data set": loader.manifest.fingerprint()}
    hosts.require_same("data", fingerprint, seconds=300)  # a large manifest takes its time
    if config.init_from and not os.path.exists(os.path.join(workdir, "config.json")):
        trained_run.check_init_from(config, loader.manifest)
    make_step = executable.load(_EXECUTABLE.value, config, mesh) if _EXECUTABLE.value else compiled
    hooks = make_hooks(parts, mesh, loader, workdir)
    first_process = jax.process_index() == 0
    profile = Profile(_PROFILE_STEPS.value, workdir, active=first_process)
    with Lock(workdir, active=first_process):
        if first_process:
            workdir_lib.forget_failure(workdir)
        try:
            return train_run(
                parts, mesh, loader, hooks, workdir, request, preemption, profile, make_step
            )
        except Divergence as failure:
            if first_process:
                with kept_going(workdir_lib.FAILURE_FILE):
                    workdir_lib.write_failure(workdir, failure.step, str(failure))
            raise


def train_run(
    parts: run.Parts,
    mesh: Mesh,
    loader: Loader,
    hooks: Sequence[Hook],
    workdir: str,
    request: resume.Request,
    preemption: Preemption,
    profile: Profile,
    make_step: Callable[[jax.stages.Lowered], Callable],
) -> int:
    """Trains from where the workdir is to the last step; returns the exit code."""
    config = parts.config
    first_process = jax.process_index() == 0
    account = Account(workdir, active=first_process)
    watchdog = Watchdog(config.faults.watchdog_s)
    optimizer, plan = run.plan(parts, mesh)
    watchdog.progress("restoring a checkpoint")
    start = resume.start(
        Checkpoints(workdir), plan, request, workdir=workdir, config=config, loader=loader
    )
    state, loader = start.state, start.stream.loader(loader)
    if state is not None and int(state.step) >= config.steps:
        logging.info(
            "%s is at step %d of %d: nothing to do", workdir, int(state.step), config.steps
        )
        return command.EXIT_OK
    if first_process:
        workdir_lib.write_identity(workdir, config, loader.manifest)
    logging.info("%s, mesh %s", run.device_names(), dict(mesh.shape))
    logging.info("%d records in %s", loader.records, config.data.path)
    filled = loader.filled_buckets()
    for i in filled:
        bucket, count, size = loader.manifest.buckets[i], loader.counts[i], loader.batch_sizes[i]
        logging.info("bucket %s: %d records, batches of %d", bucket, count, size)
        if count < size:
            logging.warning("bucket %s: a batch holds some of its records several times", bucket)
    overview.log("parameters", plan.abstract.params, plan.shardings.params)
    if state is None:
        watchdog.progress("initializing the state")
        state = state_lib.init_state(config, optimizer, plan)
        if config.init_from:
            state = trained_run.init_from(config, state, plan, loader.manifest)
    step = int(state.step)

    train_step = run.make_step(parts, optimizer, loader.manifest.autoencoder)
    batches = loader.batches(step, sharding.batch_sharding(mesh))  # reads while the step compiles
    account.lap("start_up")
    train_step = compile_train_step(
        train_step,
        plan,
        mesh,
        [loader.abstract_batch(bucket) for bucket in filled],
        progress=watchdog.progress,
        make=make_step,
    )
    account.lap("compile")
    saver = Saver(workdir, keep=config.checkpoint.keep, max_failures=config.checkpoint.max_failures)
    saver.prepare(state)
    watchdog.progress("compiled, waiting for the other processes")
    # Just before the watchdog, which does not know who is missing.
    hosts.barrier("the first step", 0.9 * config.faults.watchdog_s or 24 * 3600)
    account.lap("start_up")
    account.write(step)
    writer = MetricWriter(workdir, start_step=step, active=first_process)
    outcome = train(
        config,
        state=state,
        train_step=train_step,
        batches=batches,
        loader=loader,
        saver=saver,
        meta=resume.meta(config, loader.manifest, start.stream),
        earlier_samples=start.stream.samples,
        writer=writer,
        hooks=hooks,
        preemption=preemption,
        watchdog=watchdog,
        account=account,
        profile=profile,
    )
    saver.close()
    writer.close()
    return command.EXIT_RESUME if outcome.preempted else command.EXIT_OK


def make_hooks(parts: run.Parts, mesh, loader, workdir: str) -> list[Hook]:
    """Validation loss, FID, CLIP score and sample grids, as often as the config says."""
    config = parts.config
    hooks = []

    def weights(state):
        return state.ema_params if state.ema_params is not None else state.params

    held_out = run.make_loader(config, "validation", config.batch_size, loader.manifest)
    if config.evaluation.every:
        validation = run.make_validation(parts, held_out, mesh)

        def validate(state, step: int) -> dict[str, float]:
            del step
            return {f"val/{k}": v for k, v in validation(weights(state)).scalars().items()}

        hooks.append(Hook("validation", config.evaluation.every, validate))

    if config.evaluation.every and config.evaluation.pictures:
        hooks.append(make_picture_hook(parts, mesh, held_out, weights))

    if config.samples.every:
        prompts = list(config.samples.prompts) or [
            held_out.readable_record(i)["captions"][0] for i in range(min(8, held_out.records))
        ]
        sampler = run.make_sampler(
            parts,
            loader.manifest,
            mesh,
            run.sample_settings(config),
            batch_size=min(64, len(prompts)),
        )

        sizes = {f"_{size}": run.latent_size(config, size) for size in config.samples.sizes}

        def sample(state, step: int) -> dict[str, float]:
            raw = config.samples.weights == "raw"
            for name, size in (sizes or {"": None}).items():
                pictures = sampler(state.params if raw else weights(state), prompts, size)
                if jax.process_index() == 0:
                    path = os.path.join(workdir, "samples", f"{step:08d}{name}.png")
                    with kept_going(path):
                        os.makedirs(os.path.dirname(path), exist_ok=True)
                        draw_grid(pictures, prompts).save(path)
            return {}

        hooks.append(Hook("samples", config.samples.every, sample))
    return hooks


def make_picture_hook(
    parts: run.Parts, mesh: Mesh, held_out: Loader, weights: Callable[[Any], Any]
) -> Hook:
    """FID and CLIP score of pictures of the first validation captions."""
    config = parts.config.evaluation
    settings = evaluators.PictureSettings(
        inception=config.inception,
        clip=config.clip,
        cache=evaluators.CACHE,
        batch_size=config.batch_size,
    )
    settings.check("--config.evaluation.")
    measure = evaluators.PictureMetrics(
        settings,
        sampler=run.make_sampler(
            parts,
            held_out.manifest,
            mesh,
            run.sample_settings(parts.config),
            batch_size=min(64, config.pictures),
        ),
        prompts=evaluators.captions(held_out, config.pictures),
        loader=held_out,
        mesh=mesh,
    )

    def evaluate(state, step: int) -> dict[str, float]:
        del step
        return evaluators.training_metrics(measure(weights(state)))

    return Hook("pictures", config.every, evaluate)


if __name__ == "__main__":
    command.run(main)
