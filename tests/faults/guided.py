"""Coverage-guided fuzzing of what comes from outside, by atheris (`pip install atheris`).

    python -m tests.faults.guided record|picture|manifest FOLDER [flags of libFuzzer]

The same checks as in `test_fuzzing_*.py`; what they let through goes on being mutated here, towards
lines of our code that no input has reached yet. The first input that is neither refused in one line
nor sane ends it with 77, and is left in FOLDER (`crash-...`).
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import atheris

with atheris.instrument_imports(
    include=["mmdit_jax.data", "mmdit_jax.strict_json", "data_pipelines"]
):
    from data_pipelines.samples import Rejected
    from mmdit_jax.data.records import encode_record
    from tests.faults import test_fuzzing_data, test_fuzzing_pictures

from tests.data.making import build
from tests.faults.mutations import fuzz, mutated_bytes


class Target(NamedTuple):
    """What an input is given to, how it may be refused, and inputs that are good."""

    read: Callable[[bytes], None]
    refusal: type[Exception]
    good: list[bytes]


def _record(directory: Path) -> Target:
    del directory
    good = [encode_record(test_fuzzing_data.record(number)) for number in range(4)]
    return Target(test_fuzzing_data.read_record, ValueError, good)


def _picture(directory: Path) -> Target:
    del directory
    read = test_fuzzing_pictures.known_reason(test_fuzzing_pictures.decode)
    return Target(read, Rejected, test_fuzzing_pictures.pictures())


def _manifest(directory: Path) -> Target:
    build(directory / "data", [(0, 4), (0, 3)], [(0, 2)])
    good = (directory / "data" / "manifest.json").read_bytes()
    return Target(test_fuzzing_data.manifest_reader(directory / "data"), ValueError, [good])


TARGETS = {"record": _record, "picture": _picture, "manifest": _manifest}


def main() -> None:
    name, folder, *flags = sys.argv[1:]
    directory = Path(folder)
    target = TARGETS[name](directory)
    corpus = directory / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.good):
        (corpus / str(number)).write_bytes(data)

    def read(data: bytes) -> None:
        fuzz(target.read, [data], refusal=target.refusal)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, size)
        return mutated_bytes(random.Random(seed), data, target.good)[:size]

    limits = [f"-max_len={2 * max(map(len, target.good))}", f"-artifact_prefix={directory}/"]
    # The alarm is ours (mutations.time_limit).
    argv = [sys.argv[0], *limits, "-handle_alrm=0", *flags, str(corpus)]
    atheris.Setup(argv, read, custom_mutator=mutate)
    atheris.Fuzz()  # never returns


if __name__ == "__main__":
    main()
