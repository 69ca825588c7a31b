"""Samples of 12 of the 61 variants: python docs/make_study_samples.py runs/study/formulations"""

import argparse
from pathlib import Path

import numpy as np

from mmdit_jax import run, trained_run
from mmdit_jax.evaluation.sampling import draw_grid
from mmdit_jax.scaling import plan

OUTPUT = Path(__file__).parent / "study" / "samples.png"
ONE_A_FAMILY = (
    *("rf/lognorm(0.00, 1.00)", "rf", "rf/mode(1.29)", "rf/cosmap", "eps/linear", "v/linear"),
    *("eps/cos", "v/cos", "edm(0.00, 0.60)", "edm(-1.20, 1.20)", "edm/rf", "edm/cos"),
)
PROMPTS = (
    "a red circle",
    "a blue square",
    "two green triangles",
    "a yellow square left of a blue circle",
)


def main() -> None:
    """A column for each formulation, a row for each prompt; raw weights, 25 steps, guidance 5."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    columns = []
    for name in ONE_A_FAMILY:
        folder = workdir / plan.name_of((f"variant={name}",))
        trained = trained_run.open_run(str(folder), weights="raw")
        settings = run.sample_settings(trained.parts.config)._replace(steps=25, cfg=5.0)
        sampler = run.make_sampler(
            trained.parts, trained.manifest, trained.mesh, settings, batch_size=len(PROMPTS)
        )
        columns.append(sampler(trained.params, PROMPTS))
    pictures = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])
    labels = [f"{name}: {prompt}" for prompt in PROMPTS for name in ONE_A_FAMILY]
    OUTPUT.parent.mkdir(exist_ok=True)
    draw_grid(pictures, labels, columns=len(ONE_A_FAMILY), cell=96).save(OUTPUT)


if __name__ == "__main__":
    main()
