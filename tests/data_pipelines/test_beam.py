"""The stages that need no accelerator as a Beam pipeline."""

import functools
import importlib.util
import subprocess
import sys

import pytest

from data_pipelines import pipeline
from data_pipelines.stages import check, cpu, deduplicate

pytestmark = pytest.mark.filterwarnings("ignore")

BEAM = importlib.util.find_spec("apache_beam") is not None


@pytest.fixture
def asked(settings, images, monkeypatch):
    """A build of several blocks with near copies."""
    monkeypatch.setattr(check, "BLOCK", 4)
    monkeypatch.setattr(deduplicate, "BLOCK", 4)
    (images / "again.png").write_bytes((images / "02.png").read_bytes())
    (images / "again.txt").write_text("a copy")
    return functools.partial(
        settings, source=f"folder:{images}", deduplicate="near", near_threshold=0
    )


def prepared(asked):
    """Makes every part as workers do: from the settings and a number, last part first, twice."""
    with pipeline.open_output(asked):
        for name in cpu.STAGES:
            stage, listing = cpu.open_stage(asked, name)
            for number in 2 * list(reversed(range(len(stage.sizes)))):
                cpu.make_part(asked, name, listing, number)


def forbid(monkeypatch):
    monkeypatch.setattr(check.Check, "make", None)
    monkeypatch.setattr(deduplicate.Embed, "make", None)


def test_a_build_goes_on_from_what_workers_noted(asked, tmp_path, tree, monkeypatch):
    pipeline.build(asked(output=str(tmp_path / "whole")))
    prepared(asked())
    forbid(monkeypatch)
    pipeline.build(asked())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_worker_that_sees_other_files_makes_nothing(asked, images, tmp_path):
    stage, _ = cpu.open_stage(asked(), "checking")
    with pytest.raises(ValueError, match="holds other files or captions on a worker"):
        cpu.make_part(asked(), "checking", "another listing", 0)
    assert not stage.done(0)


def test_nothing_is_embedded_before_all_is_checked(asked):
    with pytest.raises(RuntimeError, match="before all were checked"):
        cpu.open_stage(asked(), "embedding")


def test_stages_without_work_have_no_parts(settings, images):
    drawn = settings(source="shapes", count=4)
    assert not cpu.open_stage(drawn, "checking").stage.sizes
    exact = settings(source=f"folder:{images}", deduplicate="exact")
    assert not cpu.open_stage(exact, "embedding").stage.sizes


def beam(*words):
    command = [sys.executable, "-m", "data_pipelines.beam", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1:]


@pytest.mark.slow
def test_mistakes_end_with_one_line(images, tmp_path):
    given = (f"--source=folder:{images}", f"--output={tmp_path / 'out'}", "--resolution=16")
    cases = {
        ("--num_processes=2",): "Beam divides the work",
        ("--", "runner"): "'runner' is no option of Beam",
    }
    if not BEAM:
        cases[()] = "pip install 'mmdit-jax[beam]'"
    for words, said in cases.items():
        code, lines = beam(*given, *words)
        assert code == 2 and said in lines[0], lines
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not BEAM, reason="Apache Beam is not installed")
@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_the_direct_runner_leaves_the_notes_that_a_build_leaves(
    mode, settings, images, tmp_path, tree, monkeypatch
):
    asked = functools.partial(settings, source=f"folder:{images}", deduplicate="near")
    pipeline.build(asked(output=str(tmp_path / "whole")))
    names = ("source", "resolution", "text_length", "batch_size", "deduplicate")
    given = [f"--{name}={getattr(asked(), name)}" for name in (*names, "clip_l", "clip_g", "t5")]
    options = ["--runner=DirectRunner", f"--direct_running_mode={mode}", "--direct_num_workers=2"]
    code, lines = beam(*given, f"--output={asked().output}", "--", *options)
    assert code == 0, lines
    forbid(monkeypatch)
    pipeline.build(asked())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
