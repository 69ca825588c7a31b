"""Times training, the loader, sampling and encoding on the devices that are here.

    python -m mmdit_jax.benchmark --config=configs/mmdit.py:depth=6,resolution=256 \\
        --config.batch_size=8 --peer=diffusers --json=benchmark.json

Cold: the start of this very process, without compiled programs of earlier ones. Warm: median, least
and most of several runs, each waited for. The step is the one that `mmdit_jax.train` compiles, on
batches of its loader; without `--config.data.path` the data are random numbers. `--peer=diffusers`
trains the same model in PyTorch, in a process of its own that takes turns with this one.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from mmdit_jax import command, programs, run, sharding
from mmdit_jax import config as config_lib
from mmdit_jax.config import Config
from mmdit_jax.data import synthetic
from mmdit_jax.data.loader import Loader
from mmdit_jax.encoders import clip, t5, vae
from mmdit_jax.evaluation.sampling import Sampler
from mmdit_jax.scaling import chips, flops
from mmdit_jax.training import state as state_lib
from mmdit_jax.training.goodput import process_age
from mmdit_jax.training.step import compile_train_step

# Their weights do not change how long they take.
ENCODERS = {**programs.SD3_TEXT, "vae": programs.SD3_VAE}
PARTS = ("train", "loader", "sample", *ENCODERS)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file with its arguments: configs/mmdit.py:depth=24,resolution=256"
)
_PARTS = flags.DEFINE_list(
    "parts", ["train", "loader", "sample"], f"What is timed, some of {','.join(PARTS)}."
)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Runs of each part.", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 120.0, "After so long a part is not run again, once it has been run three times."
)
_JSON = flags.DEFINE_string("json", "", "File for the result as one JSON object.")
_PEER = flags.DEFINE_enum(
    "peer", "", ["", "diffusers"], "Trains the same model in PyTorch and prints the ratio."
)
_PEER_COMPILE = flags.DEFINE_bool(
    "peer_compile", None, "Whether the peer uses torch.compile; by default on a GPU."
)
ROUNDS = 3  # in which this process and the peer take turns

# As launch/venv.sh has it: heaps that are kept when they are freed, in pages of 2 MB.
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=268435456"
)


def summary(seconds: list[float], per_run: float) -> dict[str, Any]:
    """Median, least and most of the seconds of a run, and `per_run` divided by the median."""
    median = float(np.median(seconds))
    return {
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "n": len(seconds)},
        "per_second": per_run / median,
    }


def timed(work: Callable[[], Any], repeats: int, seconds: float) -> list[float]:
    """Seconds of `repeats` runs, waited for one by one; of three or more that take so long."""
    found: list[float] = []
    while len(found) < repeats and (len(found) < 3 or sum(found) < seconds):
        start = time.monotonic()
        jax.block_until_ready(work())
        found.append(time.monotonic() - start)
    return found


class Training:
    """The training step with a state and one batch of the loader."""

    def __init__(self, parts: run.Parts, loader: Loader, cold: dict[str, float]):
        """Writes into `cold` how long each part of the start takes."""
        config, mesh = parts.config, run.make_mesh(parts.config)
        bucket = loader.filled_buckets()[0]
        with _stopwatch(cold, "init"):
            optimizer, plan = run.plan(parts, mesh)
            self._state = jax.block_until_ready(state_lib.init_state(config, optimizer, plan))
        step = run.make_step(parts, optimizer, loader.manifest.autoencoder)
        with _stopwatch(cold, "compile"):
            self._step = compile_train_step(step, plan, mesh, [loader.abstract_batch(bucket)])
        with _stopwatch(cold, "first_step"):
            batches = loader.batches(0, sharding.batch_sharding(mesh))
            self._batch = next(batches)
            self()
        batches.close()
        self.params = self._state.params

    def __call__(self) -> Any:
        """Makes one step and waits for it."""
        self._state, metrics = self._step(self._state, self._batch)
        self.params = self._state.params
        return jax.block_until_ready((self._state, metrics))[1]


class Peer:
    """The process that trains the same model in PyTorch: it works only while it is asked to."""

    def __init__(self, config: Config):
        """Starts it and waits until it has made its first step."""
        platform = jax.default_backend()
        if platform == "tpu":
            raise ValueError("--peer=diffusers needs a CPU or a GPU, PyTorch has no TPU here")
        if config.model.backbone != "mmdit":
            raise ValueError(
                f"--peer=diffusers has no model.backbone={config.model.backbone!r}; use mmdit"
            )
        compiled = _PEER_COMPILE.value
        settings = {
            "device": "cuda" if platform == "gpu" else "cpu",
            "dtype": jnp.dtype(state_lib.compute_dtype(config)).name,
            "compile": platform == "gpu" if compiled is None else compiled,
            "batch_size": config.batch_size,
            "latent_side": config_lib.latent_side(config),
            "text_tokens": config_lib.text_tokens(config),
            "pooled_width": config_lib.pooled_width(config),
            "checkpointing": config.model.remat != "none",
            "learning_rate": config.optimizer.learning_rate,
            **{
                name: config.model[name]
                for name in ("depth", "channels", "patch", "context_width", "qk_norm")
            },
            "dual_attention_layers": config.model.dual_attention_layers,
            "pos_embed_max_size": config.model.pos_embed_max_size,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmdit_jax.benchmark_diffusers", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._answer()

    def steps(self, number: int) -> list[float]:
        """Seconds of each of so many steps."""
        assert self._process.stdin
        print(number, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the peer ended with exit code {self._process.wait()}")


def time_training(parts: run.Parts, loader: Loader, results: dict[str, Any]) -> Any:
    """Times the training step, in turns with the peer if there is one; returns the parameters."""
    config = parts.config
    training = Training(parts, loader, results["cold"])
    peer = Peer(config) if _PEER.value else None
    ours_has = state_lib.count_parameters(training.params)
    if peer and peer.about["parameters"] != ours_has:
        raise RuntimeError(f"not the same model: {ours_has} and {peer.about} parameters")
    rounds = ROUNDS if peer else 1
    repeats, ours, theirs = -(-_REPEATS.value // rounds), [], []
    for _ in range(rounds):
        ours += timed(training, repeats, _SECONDS.value / rounds)
        theirs += peer.steps(repeats) if peer else []
    found = summary(ours, config.batch_size)
    rate = found["per_second"] * flops.train_per_sample(config) / jax.device_count()
    found |= {"unit": "samples/s", "tflops_per_device": rate / 1e12}
    if peak := chips.peak_flops(jax.devices()[0].device_kind):
        found["mfu"] = rate / peak
    results["train"] = found
    if peer:
        peer.close()
        results["peer"] = summary(theirs, config.batch_size) | peer.about | {"unit": "samples/s"}
        results["ratio_to_peer"] = found["per_second"] / results["peer"]["per_second"]
    return training.params


def time_loader(config: Config, loader: Loader) -> dict[str, Any]:
    """Times batches from the shards to the devices, read as fast as they come."""
    batches = loader.batches(0, sharding.batch_sharding(run.make_mesh(config)))
    for _ in range(1 + config.data.prefetch):  # these have been read ahead, while nobody waited
        next(batches)
    seconds = timed(lambda: next(batches), max(_REPEATS.value, 20), _SECONDS.value)
    batches.close()
    # Threads hand over several batches at once: the mean is what a long run sees.
    found = summary(seconds, config.batch_size)
    return (
        found
        | {"per_second": config.batch_size * len(seconds) / sum(seconds)}
        | {"unit": "samples/s"}
    )


def time_sampling(parts: run.Parts, loader: Loader, params: Any) -> dict[str, Any]:
    """Times the solver on encoded prompts, as many as a batch has, without decoding."""
    config, batch = parts.config, loader.host_batch(0, np.arange(parts.config.batch_size))
    # The encoders of a sampler give float32, whatever a data set stores.
    text = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, batch["text"])
    side = config_lib.latent_side(config)
    sampler = Sampler(
        predict=parts.predict,
        assemble=parts.conditioning.assemble,
        encode=lambda prompts: text,
        decode=lambda latents: latents,
        formulation=parts.formulation,
        latent_shape=(side, side, config.model.channels),
        mesh=run.make_mesh(config),
        settings=run.sample_settings(config),
        batch_size=config.batch_size,
    )
    prompts = [""] * config.batch_size
    sampler(params, prompts)
    found = summary(
        timed(lambda: sampler(params, prompts), _REPEATS.value, _SECONDS.value), config.batch_size
    )
    return found | {"unit": f"pictures/s ({config.samples.steps} steps)"}


def time_encoder(config: Config, name: str) -> dict[str, Any]:
    """Times a frozen network of SD3's sizes with random weights on one batch."""
    sizes, dtype = ENCODERS[name], state_lib.compute_dtype(config)
    place = sharding.local_mesh()
    key, batch = jax.random.key(0), config.batch_size
    if name == "vae":
        module, room = vae.AutoencoderKL(sizes), vae
        inputs = jnp.zeros((batch, config.data.resolution, config.data.resolution, 3))
    else:
        room = t5 if name == "t5" else clip
        module = (t5.T5Encoder if name == "t5" else clip.CLIPTextEncoder)(sizes, dtype)
        inputs = jnp.zeros((batch, config.data.text_encoders[name].length), jnp.int32)
    shapes = room.abstract_params(module)
    kept = jnp.float32 if name == "vae" else dtype  # as the data pipeline loads them

    def random_weights(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            0.02 * jax.random.normal(k, x.shape, kept) for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, drawn)

    params = jax.jit(random_weights, out_shardings=sharding.frozen_shardings(shapes, place))(key)
    inputs = jax.device_put(inputs, sharding.batch_sharding(place))
    method = "encode" if name == "vae" else None

    def encode(params: Any, inputs: jax.Array) -> Any:
        return module.apply({"params": sharding.gather(params)}, inputs, method=method)

    compiled = jax.jit(encode)
    with jax.set_mesh(place):
        jax.block_until_ready(compiled(params, inputs))
        seconds = timed(lambda: compiled(params, inputs), _REPEATS.value, _SECONDS.value)
    return summary(seconds, batch) | {"unit": "pictures/s" if name == "vae" else "captions/s"}


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    cold = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in results["cold"].items())
    lines = [results["devices"], f"cold: {cold}", ""]
    lines += [f"{'':9}{'median s':>12}{'min':>10}{'max':>10}{'n':>4}{'a second':>12}"]
    for name in (*PARTS, "peer"):
        if part := results.get(name):
            s = part["seconds"]
            lines.append(
                f"{name:9}{s['median']:12.4f}{s['min']:10.4f}{s['max']:10.4f}{s['n']:4}"
                f"{part['per_second']:12.4g} {part['unit']}"
                + (f"  {part['tflops_per_device']:.3g} TFLOP/s" if name == "train" else "")
                + (f"  MFU {part['mfu']:.1%}" if "mfu" in part else "")
            )
    if "ratio_to_peer" in results:
        lines += [
            "",
            f"{results['ratio_to_peer']:.3f} x the samples/s of {results['peer']['peer']}",
        ]
    return "\n".join(lines)


@contextlib.contextmanager
def _stopwatch(found: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    found[name] = time.monotonic() - start


def in_kept_memory(argv: list[str]) -> int | None:
    """Runs this command on CPU as `launch/` runs commands, if the environment is not that one.

    XLA allocates its buffers anew in every step, and malloc must keep their memory (glibc, from the
    start of a process) or much of a step is spent on clearing new pages. The peer runs likewise.

    Returns:
        The exit code; None where nothing is to be changed.
    """
    if "GLIBC_TUNABLES" in os.environ or jax.default_backend() != "cpu":
        return None
    command_line = [sys.executable, "-m", "mmdit_jax.benchmark", *argv[1:]]
    environment = os.environ | {"GLIBC_TUNABLES": MALLOC}
    return subprocess.run(command_line, env=environment, check=False).returncode


def main(argv: list[str]) -> int:
    """Times the parts that are asked for."""
    del argv
    if _CONFIG.value is None:
        raise ValueError("--config is missing; for example --config=configs/mmdit.py:depth=6")
    if unknown := [part for part in _PARTS.value if part not in PARTS]:
        raise ValueError(f"--parts={','.join(unknown)} is unknown; known are {', '.join(PARTS)}")
    if _PEER.value and "train" not in _PARTS.value:
        raise ValueError("--peer is compared in training; add train to --parts")
    config = _CONFIG.value
    cold = {"import": process_age()}
    jax.config.update("jax_enable_compilation_cache", False)
    command.run_programs_in_this_thread()
    if _PEER.value:  # both live on one GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _stopwatch(cold, "devices"):
        jax.devices()
    if (code := in_kept_memory(sys.argv)) is not None:
        return code
    parts = run.build(config)
    results: dict[str, Any] = {"config": config_lib.to_json(config), "cold": cold}
    with tempfile.TemporaryDirectory() as folder:
        if not config.data.path:
            config.data.path = folder
            synthetic.write(folder, run.expected_data(config), records=32)
        loader = run.make_loader(config, "train")
        params = None
        if {"train", "sample"} & set(_PARTS.value):
            params = time_training(parts, loader, results)
        if "loader" in _PARTS.value:
            results["loader"] = time_loader(config, loader)
        if "sample" in _PARTS.value:
            results["sample"] = time_sampling(parts, loader, params)
        for name in filter(ENCODERS.__contains__, _PARTS.value):
            logging.info("making random weights for %s", name)
            results[name] = time_encoder(config, name)
    results["devices"] = run.device_names()
    print(table(results))
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return command.EXIT_OK


if __name__ == "__main__":
    command.run(main)
