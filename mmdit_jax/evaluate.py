"""Evaluates trained runs and writes one JSON object: evaluator -> {metric: number}, plus settings.

    python -m mmdit_jax.evaluate --workdir=runs/shapes --evaluators=val_loss,shapes \\
        --output=results.json

    val_loss     loss on fixed (sample, t, noise) triples of the validation split
    shapes       samples the held-out prompts of the built-in pictures, finds the objects in the
                 pixels, scores colour, shape, count, position, pairs, binding as GenEval does
    fid          Frechet distance of samples to the validation pictures, or those of --reference, in
                 features of --inception (fid), of --clip (clip_fid), or both
    clip_score   100 x cosine between samples and their captions, by --clip
    geneval      the prompts of --geneval_prompts, judged by --detector and, for colours, --clip
    path_length  length of the sampling paths; with --clip what few steps cost (Table 6)
    human        by itself, without a run: writes a page that asks people which of --samples they
                 prefer, or counts the --votes that they downloaded from it

    python -m mmdit_jax.evaluate --evaluators=human --samples=out/a,out/b --output=study.html
    python -m mmdit_jax.evaluate --evaluators=human --votes=one.json,two.json --output=human.json

fid and clip_score share their samples. With several --samplers or --weights the object is {"each":
[as above, ...]}, one for each combination; with several workdirs {"runs": {workdir: as above}}, and
path_length makes Table 6 of them. docs/evaluation.md says what each file is.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

import mmdit_jax
from mmdit_jax import command, evaluators, files, run, strict_json, trained_run
from mmdit_jax import config as config_lib
from mmdit_jax.data import shapes as shapes_data
from mmdit_jax.data.loader import Loader
from mmdit_jax.encoders.inception import RESIZES
from mmdit_jax.evaluation import clip_score as clip_score_lib
from mmdit_jax.evaluation import detection, features, preference, ranking
from mmdit_jax.evaluation import geneval as geneval_lib
from mmdit_jax.evaluation import path_length as path_length_lib
from mmdit_jax.evaluation import shapes as shapes_lib
from mmdit_jax.evaluation.sampling import Sampler, SampleSettings
from mmdit_jax.evaluation.validation import LEVELS
from mmdit_jax.scaling.results import each

_WORKDIR = flags.DEFINE_list("workdir", None, "Of a run of mmdit_jax.train, or of several.")
_EVALUATORS = flags.DEFINE_list("evaluators", ["val_loss"], "Names, separated by commas.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_STEP = flags.DEFINE_integer("step", 0, "Checkpoint; 0 is the newest.")
_WEIGHTS = flags.DEFINE_list("weights", [], "ema, raw or ema,raw; empty: ema where there is one.")
_SAMPLERS = flags.DEFINE_list(
    "samplers",
    [],
    "STEPS:CFG of several samplers, in place of --steps and --cfg; paper: the six of its study.",
)
_STEPS = flags.DEFINE_integer("steps", None, "Solver steps of sampling evaluators.", lower_bound=1)
_CFG = flags.DEFINE_float("cfg", None, "Guidance scale of sampling evaluators.")
_SOLVER = flags.DEFINE_string("solver", None, "euler, heun or ddim.")
_SHIFT = flags.DEFINE_float("shift", None, "Shift of the sampling times.")
_SEED = flags.DEFINE_integer("seed", None, "Of the initial noise.")
_PICTURES = flags.DEFINE_integer(
    "pictures_per_category", 96, "Pictures of each category of shapes.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Pictures in one call.", lower_bound=1)
_ENCODERS = flags.DEFINE_string(
    "encoders", "", "Folder with clip_l/, clip_g/, t5/, when they are not where the data says."
)
_AUTOENCODER = flags.DEFINE_string(
    "autoencoder", "", "Folder of the VAE, when it is not where the data says."
)
_SAMPLES = flags.DEFINE_list("samples", [], "For human: folders of mmdit_jax.sample to compare.")
_VOTES = flags.DEFINE_list("votes", [], "For human: files that its page downloaded.")
_GRID = flags.DEFINE_enum("grid", None, list(LEVELS), "Noise levels of val_loss.")
_LEVELS = flags.DEFINE_integer("levels", None, "How many noise levels val_loss has.", lower_bound=1)
_CAPTIONS = flags.DEFINE_integer(
    "pictures", 1000, "Captions of the validation split that are sampled, at most.", lower_bound=2
)
_INCEPTION = flags.DEFINE_string("inception", "", "File of FID's InceptionV3 (safetensors).")
_CLIP = flags.DEFINE_string(
    "clip", "", "Folder of a CLIP of transformers, or MODEL,TOKENIZER; the paper's is L/14."
)
_RESIZE = flags.DEFINE_enum("resize", RESIZES[0], list(RESIZES), "Of the InceptionV3's pictures.")
_REFERENCE = flags.DEFINE_string(
    "reference", "", "Of fid: a folder of pictures, or .npz of mu and sigma; empty: validation."
)
_STATISTICS = flags.DEFINE_string(
    "statistics", evaluators.CACHE, "Folder that keeps statistics of references; empty: none."
)
_GENEVAL_PROMPTS = flags.DEFINE_string("geneval_prompts", "", "evaluation_metadata.jsonl.")
_DETECTOR = flags.DEFINE_string("detector", "", "Folder of a detector of transformers.")
_IMAGES = flags.DEFINE_integer(
    "images_per_prompt", geneval_lib.IMAGES_PER_PROMPT, "Of geneval.", lower_bound=1
)

Metrics = dict[str, float]
Settings = dict[str, Any]


class Job:
    """Weights of a run and a sampler; what several of a run have in common is made once."""

    def __init__(
        self, trained: trained_run.TrainedRun, sampler: Settings, like: "Job | None" = None
    ):
        """`sampler`: steps and cfg, where they are not the flags'; `like`: of the same run."""
        self.trained, self._like = trained, like
        overrides = {
            "steps": _STEPS.value,
            "cfg": _CFG.value,
            "solver": _SOLVER.value,
            "shift": _SHIFT.value,
            "seed": _SEED.value,
            **sampler,
        }
        self.sampling: SampleSettings = run.sample_settings(trained.parts.config)._replace(
            **{name: value for name, value in overrides.items() if value is not None}
        )

    @functools.cached_property
    def sampler(self) -> Sampler:
        """With the job's settings."""
        if self._like is not None:
            return self._like.sampler.with_settings(**self.sampling._asdict())
        return run.make_sampler(
            self.trained.parts,
            self.trained.manifest,
            self.trained.mesh,
            self.sampling,
            encoders=_ENCODERS.value,
            autoencoder=_AUTOENCODER.value,
            batch_size=_BATCH_SIZE.value,
        )

    @functools.cached_property
    def loader(self) -> Loader:
        """Of the validation split."""
        if self._like is not None:
            return self._like.loader
        config = self.trained.parts.config
        return run.make_loader(config, "validation", config.evaluation.batch_size)

    @functools.cached_property
    def picture_metrics(self) -> evaluators.PictureMetrics:
        """fid and clip_score, as far as they are asked for."""
        if self._like is not None:
            return self._like.picture_metrics.with_sampler(self.sampler)
        return evaluators.PictureMetrics(
            picture_settings(),
            sampler=self.sampler,
            prompts=evaluators.captions(self.loader, _CAPTIONS.value),
            loader=self.loader,
            mesh=self.trained.mesh,
            wanted=[name for name in ("fid", "clip_score") if name in _EVALUATORS.value],
        )

    @functools.cached_property
    def pictures(self) -> tuple[dict[str, Metrics], Settings]:
        """Both, of the same pictures."""
        return self.picture_metrics(self.trained.params), self.picture_metrics.settings()


def picture_settings() -> evaluators.PictureSettings:
    """Of the flags."""
    return evaluators.PictureSettings(
        inception=_INCEPTION.value,
        clip=_CLIP.value,
        resize=_RESIZE.value,
        reference=_REFERENCE.value,
        cache=_STATISTICS.value,
    )


def val_loss(job: Job) -> tuple[Metrics, Settings]:
    """Validation loss of the run's own data set."""
    config = job.trained.parts.config
    with config.unlocked():
        config.evaluation.grid = _GRID.value or config.evaluation.grid
        config.evaluation.levels = _LEVELS.value or config.evaluation.levels
    grid, levels = config.evaluation.grid, config.evaluation.levels
    result = run.make_validation(job.trained.parts, job.loader, job.trained.mesh)(
        job.trained.params
    )
    return result.scalars(), {
        "samples": result.samples,
        "grid": grid,
        "levels": LEVELS[grid].replace("K", str(levels)),
        "data": config.data.path,
    }


def shapes(job: Job) -> tuple[Metrics, Settings]:
    """Accuracy on prompts of the built-in pictures that do not occur in training."""
    prompts = [
        prompt
        for category in shapes_data.CATEGORIES
        for prompt in itertools.islice(
            itertools.cycle(shapes_data.prompts(category)), _PICTURES.value
        )
    ]
    metrics = shapes_lib.evaluate(
        lambda texts: job.sampler(job.trained.params, texts), prompts, images_per_prompt=1
    )
    return metrics, {
        **job.sampling._asdict(),
        "prompts": len(set(prompts)),
        "pictures_per_category": _PICTURES.value,
    }


def fid(job: Job) -> tuple[Metrics, Settings]:
    """Frechet distance of samples to reference pictures."""
    results, settings = job.pictures
    return results["fid"], settings


def clip_score(job: Job) -> tuple[Metrics, Settings]:
    """How well samples fit the captions that they are made of."""
    results, settings = job.pictures
    return results["clip_score"], settings


def geneval(job: Job) -> tuple[Metrics, Settings]:
    """Objects, counts, colours and positions of prompts, found by a detector."""
    asked = geneval_lib.read_prompts(_GENEVAL_PROMPTS.value)
    asked = [prompt for prompt in asked for _ in range(_IMAGES.value)]
    detector = detection.TransformersDetector(_DETECTOR.value)
    unknown = sorted({name for prompt in asked for name in classes(prompt)} - detector.classes)
    if unknown:
        raise ValueError(
            f"--detector={_DETECTOR.value} does not know {', '.join(unknown[:4])}, which "
            f"{_GENEVAL_PROMPTS.value} asks for; give one that was trained on COCO"
        )
    clip = features.clip_features(_CLIP.value.partition(",")[0], mesh=job.trained.mesh)
    colors = detection.ClipColors(clip, clip_score_lib.text_tower(_CLIP.value))
    judge = geneval_lib.GenEval(asked, detector, colors)
    for texts, pictures in job.sampler.pictures(job.trained.params, [p["prompt"] for p in asked]):
        judge.add(texts, pictures)
    return judge.metrics(), {
        **job.sampling._asdict(),
        "prompts": len(asked) // _IMAGES.value,
        "images_per_prompt": _IMAGES.value,
        "threshold": geneval_lib.THRESHOLD,
        "counting_threshold": geneval_lib.COUNTING_THRESHOLD,
        "position_threshold": geneval_lib.POSITION_THRESHOLD,
        "max_objects": geneval_lib.MAX_OBJECTS,
        "detector": detector.about,
        "colors": clip.about,
    }


def classes(prompt: dict[str, Any]) -> set[str]:
    """The classes that a prompt of geneval speaks of."""
    return {asked["class"] for key in ("include", "exclude") for asked in prompt.get(key, [])}


def path_length(job: Job) -> tuple[Metrics, Settings]:
    """A row of Table 6."""
    trained = job.trained
    make_score = None
    if _CLIP.value:
        clip = features.clip_features(_CLIP.value.partition(",")[0], mesh=trained.mesh)
        text = clip_score_lib.text_tower(_CLIP.value)
        make_score = functools.partial(clip_score_lib.ClipScore, clip, text)
    prompts = evaluators.captions(job.loader, _CAPTIONS.value)
    steps = path_length_lib.STEPS
    metrics = path_length_lib.path_length(
        lambda count: job.sampler.with_settings(steps=count),
        trained.params,
        prompts,
        make_score,
        steps,
    )
    settings = {**job.sampling._asdict(), "steps": steps, "prompts": len(prompts)}
    return metrics, settings | ({"clip": clip.about} if _CLIP.value else {})


EVALUATORS: dict[str, Callable[[Job], tuple[Metrics, Settings]]] = {
    "val_loss": val_loss,
    "shapes": shapes,
    "fid": fid,
    "clip_score": clip_score,
    "geneval": geneval,
    "path_length": path_length,
}


def check_flags() -> None:
    """Refuses what cannot be evaluated, before a run is opened."""
    if not _WORKDIR.value or not _OUTPUT.value:
        raise ValueError("--workdir and --output are needed; see --help")
    names = _EVALUATORS.value
    unknown = [name for name in names if name not in EVALUATORS]
    if unknown or not names:
        raise ValueError(
            f"evaluator {', '.join(unknown) or '(none)'} is unknown; known are "
            f"{', '.join(EVALUATORS)}"
        )
    if unknown := [name for name in _WEIGHTS.value if name not in config_lib.WEIGHTS]:
        raise ValueError(f"--weights={unknown[0]} must be ema, raw or ema,raw")
    fixed = [name for name in names if name in ("val_loss", "path_length")]
    if _SAMPLERS.value and (fixed or _STEPS.value or _CFG.value):
        raise ValueError(
            f"--samplers={','.join(_SAMPLERS.value)} does not go with "
            f"{', '.join([*fixed, '--steps and --cfg'])}: evaluate them in another call"
        )
    ranking.parse_samplers(_SAMPLERS.value)
    for evaluator, needed in {
        "clip_score": {"clip": _CLIP.value},
        "geneval": {
            "geneval_prompts": _GENEVAL_PROMPTS.value,
            "detector": _DETECTOR.value,
            "clip": _CLIP.value,
        },
    }.items():
        missing = [f"--{flag}" for flag, value in needed.items() if not value]
        if evaluator in names and missing:
            raise ValueError(
                f"evaluator {evaluator} needs {', '.join(missing)}; docs/evaluation.md says where "
                "to get them"
            )
    if {"fid", "clip_score"} & set(names):
        picture_settings().check()
    if "geneval" in names:
        geneval_lib.read_prompts(_GENEVAL_PROMPTS.value)


def evaluate_run(workdir: str) -> dict[str, Any]:
    """Opens a run and evaluates it, with every sampler and all weights that are asked for."""
    config = trained_run.read_config(workdir)
    names = _WEIGHTS.value or ["ema" if config.ema.decay > 0 else "raw"]
    weights = [trained_run.open_run(workdir, weights=name, step=_STEP.value) for name in names]
    samplers = ranking.parse_samplers(_SAMPLERS.value) or [{}]
    first = Job(weights[0], samplers[0])
    found = []
    for sampler in samplers:
        job = Job(weights[0], sampler, like=first)  # of all weights: compiled once
        found += [evaluate_job(workdir, Job(trained, sampler, like=job)) for trained in weights]
    return found[0] if len(found) == 1 else {"each": found}


def evaluate_job(workdir: str, job: Job) -> dict[str, Any]:
    """Every evaluator on one kind of weights with one sampler."""
    results: dict[str, Any] = {}
    settings: dict[str, Any] = {
        "workdir": os.path.abspath(workdir),
        "step": job.trained.step,
        "weights": job.trained.weights,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "version": mmdit_jax.__version__,
    }
    for name in _EVALUATORS.value:
        results[name], settings[name] = EVALUATORS[name](job)
        line = "  ".join(f"{metric} {value:.4g}" for metric, value in results[name].items())
        logging.info("%s: %s", name, line)
    return {**results, "settings": settings}


def main(argv: list[str]) -> int:
    """Evaluates every run, writes."""
    del argv
    if "human" in _EVALUATORS.value:
        print(preference.evaluate(_EVALUATORS.value, _SAMPLES.value, _VOTES.value, _OUTPUT.value))
        return command.EXIT_OK
    check_flags()
    results = {workdir: evaluate_run(workdir) for workdir in _WORKDIR.value or ()}
    whole = {"runs": results} if len(results) > 1 else next(iter(results.values()))
    files.write_whole(_OUTPUT.value, strict_json.dumps(whole, indent=2) + "\n")
    if "path_length" in _EVALUATORS.value:
        rows = [
            (os.path.basename(workdir.rstrip("/")), content["path_length"])
            for workdir, whole in results.items()
            for content in each(whole)
        ]
        print(path_length_lib.table(rows))
    print(f"results in {_OUTPUT.value}")
    return command.EXIT_OK


if __name__ == "__main__":
    command.run(main)
