"""Fills the table of docs/scale.md, a search for every row, and goes on where it was stopped.

    python docs/make_scale.py [--max_compiles=2] [--depths=24,38] [--resolutions=256]
        [--topologies=v5p-512] [--again]
    python docs/make_scale.py --table_only

The first needs libtpu (`pip install "jax[tpu]"`) and no TPU; a compilation takes minutes on two
cores. What was found is kept in docs/scale.json, one entry a row, from one call to the next;
`--again` makes rows anew. The second compiles nothing and takes seconds. Rows that have not been
compiled say so and show what a search would compile first, guessed in closed form.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import mmdit  # noqa: E402
from mmdit_jax.models.backbone import REMAT_POLICIES  # noqa: E402
from mmdit_jax.scaling import chips, flops, search  # noqa: E402
from mmdit_jax.training import state as state_lib  # noqa: E402

RESULTS, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- table: docs/make_scale.py -->", "<!-- end of table -->"

DEPTHS = (15, 18, 21, 24, 30, 38)
RESOLUTIONS = (256, 512, 1024)
TOPOLOGIES = ("v5e-256", "v5p-512", "v6e-256")
STEPS, BATCH = 500_000, 4096

HEADER = (
    "| depth | px | chips | from | mesh | remat | micro-batches | HBM GiB | step s | bound by "
    "| samples/s | utilisation | days | chip-hours |\n|" + "---|" * 14
)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def compiled(depth: int, resolution: int, topology: str, most: int) -> dict[str, Any]:
    """What `mmdit_jax.compile --search --json` says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mmdit_jax.compile", "--search", "--json"),
            f"--config=configs/mmdit.py:depth={depth},resolution={resolution}",
            f"--config.batch_size={BATCH}",
            f"--topology={topology}",
            f"--max_compiles={most}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"d={depth} {resolution} px {topology}: exit code {done.returncode}")
    return json.loads(done.stdout)


@functools.cache
def parameters(depth: int) -> int:
    """Of the model, whatever the resolution."""
    return state_lib.count_parameters(state_lib.abstract_params(mmdit.get_config(f"depth={depth}")))


def guessed(depth: int, resolution: int, name: str) -> tuple[search.Candidate, float] | None:
    """What a search would compile first, and its utilisation; None where nothing seems to fit."""
    config = mmdit.get_config(f"depth={depth},resolution={resolution}")
    config.batch_size = BATCH
    config.model.update(attention="flash", last_block="scanned")
    topology = chips.topology(name)
    every = search.candidates(
        config, topology, parameters=parameters(depth), policies=tuple(REMAT_POLICIES)
    )
    best = search.guess(every, topology.chip.hbm_limit)
    if best is None:
        return None
    peak = topology.devices * topology.chip.bf16_flops
    return best, BATCH * flops.train_per_sample(config) / best.cost / peak


def row(depth: int, resolution: int, name: str, found: Mapping[str, Any] | None) -> str:
    """One line of the table."""
    start = f"| {depth} | {resolution} | {name} |"
    if found is not None and found["best"] is not None:
        best = found["best"]
        accumulate = found["overrides"].partition("optimizer.accumulate=")[2].split()[0]
        cells = ["compiler", *setting(best["mesh"], best["remat"], accumulate)]
        memory, bound, utilisation = best["hbm_used"], best["bound"], best["utilisation"]
        seconds = best["step_seconds"]
    else:
        guess = guessed(depth, resolution, name)
        source = "guess"
        if found is not None:
            source += f"; {len(found['compiled'])} compiled, none fits"
        if guess is None:
            return f"{start} {source}: nothing fits |" + " |" * 10
        best, utilisation = guess
        cells = [source, *setting(best.mesh, best.remat, str(best.accumulate))]
        memory, seconds, bound = best.memory, best.cost, best.bound
    topology = chips.topology(name)
    hours = STEPS * seconds / 3600
    cells += [
        f"{memory / chips.GIB:.1f} of {topology.chip.hbm_limit / chips.GIB:.1f}",
        f"{seconds:.3f}",
        bound,
        f"{BATCH / seconds:,.0f}",
        f"{utilisation:.0%}",
        f"{hours / 24:.1f}",
        f"{hours * topology.chips:,.0f}",
    ]
    return f"{start} {' | '.join(cells)} |"


def setting(mesh: Mapping[str, int], remat: str, accumulate: str) -> list[str]:
    """Cells of what is chosen."""
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
    return [axes, remat, accumulate]


def write(results: dict[str, Any]) -> None:
    """Puts the table between its two marks."""
    rows = [
        row(depth, resolution, topology, results.get(f"{depth} {resolution} {topology}"))
        for depth in DEPTHS
        for resolution in RESOLUTIONS
        for topology in TOPOLOGIES
    ]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    table = "\n".join([BEGIN, "", HEADER, *rows, "", END])
    PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_compiles", type=int, default=2)
    parser.add_argument("--depths", type=numbers, default=DEPTHS)
    parser.add_argument("--resolutions", type=numbers, default=RESOLUTIONS)
    parser.add_argument("--topologies", type=lambda text: text.split(","), default=TOPOLOGIES)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table_only", action="store_true", help="compile nothing")
    chosen = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for depth in () if chosen.table_only else chosen.depths:
        for resolution in chosen.resolutions:
            for topology in chosen.topologies:
                name = f"{depth} {resolution} {topology}"
                if name in results and not chosen.again:
                    continue
                found = compiled(depth, resolution, topology, chosen.max_compiles)
                results[name] = found
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                write(results)
    write(results)


if __name__ == "__main__":
    main()
