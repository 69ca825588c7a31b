"""The page of runs and of a sweep: self-contained, escaped, with everything that is there."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from mmdit_jax import page


class Parsed(HTMLParser):
    """Tags that are open at the end, addresses, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.addresses, self.text, self.tags = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_what_users_wrote_is_text_and_tables_are_whole(tmp_path):
    evil = '<script>alert("x")</script>&'
    parts = [
        page.section(evil, page.note(evil), page.table(("a", "b"), [(evil, "1")], numbers=(1,))),
        page.picture(b"\x89PNG", evil),
    ]
    page.write(tmp_path / "new" / "p.html", evil, parts)
    parsed = Parsed((tmp_path / "new" / "p.html").read_text())
    assert not parsed.open and "script" not in parsed.tags
    assert parsed.text.count(evil) == 5  # title, heading, note, cell, caption
    assert parsed.addresses == ["data:image/png;base64,iVBORw=="]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "p.html"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        page.write(tmp_path / "file" / "p.html", "t", [])


@pytest.mark.long
def test_a_report_of_runs_and_of_a_sweep_needs_nothing_else(commands, trained, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    first, second = tmp_path / "first", tmp_path / "a<b>"
    for folder in (first, second):
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))
    changed = json.loads((second / "config.json").read_text())
    changed["config"]["seed"] = 77
    (second / "config.json").write_text(json.dumps(changed))
    for step in (1, 2, 3, 4):
        shutil.copy(first / "samples" / "00000006.png", first / "samples" / f"0000000{step}.png")
    commands.run("mmdit_jax.report", str(first), "--grids=3")
    text = (first / "report.html").read_text()
    parsed = Parsed(text)
    assert not parsed.open and "script" not in parsed.tags
    assert all(a.startswith(("data:image/png", "#")) for a in parsed.addresses)
    assert re.findall(r"first, step (\d+)", parsed.text) == ["1", "3", "6"]
    for words in (
        "training loss",
        "validation loss",
        "images per second",
        "validation loss by level",
        "first, step 6",
        "Where the time went",
        "data_wait",
        "6 of 6",
        "config and versions",
    ):
        assert words in parsed.text, words

    output = tmp_path / "both.html"
    commands.run("mmdit_jax.report", str(first), str(second), f"--output={output}", "--grids=0")
    parsed = Parsed(output.read_text())
    assert "a<b>" in parsed.text and "77" in parsed.text and "seed" in parsed.text
    differences = parsed.text[parsed.text.index("What the settings differ in") :]
    assert "batch_size" not in differences and "data:image" not in output.read_text()

    def sampled(metrics, steps):
        return {**metrics, "settings": {"clip_score": {"steps": steps, "cfg": 5}}}

    sweep = tmp_path / "sweep"
    rows, plan = [], {}
    for depth in (1, 2, 3, 4, 5):
        name = f"depth-{depth}"
        shutil.copytree(first, sweep / name)
        plan[name] = {}
        metrics = {"val_loss": {"loss": 0.3 + 1 / depth}, "fid": {"fid": 9.0 / depth}}
        metrics["clip_score"] = {"clip_score": depth % 3}
        rows.append(
            {"name": name, "parameters": depth**3, "steps": 6, "samples": 48, "flops": depth**4}
            | {"flops_per_step": 7, "metrics": metrics}
            | {"evaluations": {"-a": {"each": [sampled(metrics, steps) for steps in (5, 50)]}}}
        )
    (sweep / "sweep.json").write_text(json.dumps({"runs": plan}))
    (sweep / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = commands.run("mmdit_jax.report", str(sweep), "--held_out=depth-4")
    averages = (sweep / "report.html").read_text().split("Average ranks")[1]
    assert re.search(r"5 steps.*depth-5</td><td class=.number.>1.00</td><td", averages)
    assert "50 steps" in averages and "over 2 settings" in averages
    assert re.search(r"depth-1</td><td class=.number.>[23].00", averages)
    assert "run depth-4" in printed and "L(C)" in printed
    parsed = Parsed((sweep / "report.html").read_text())
    assert "fid over the loss" in parsed.text.replace("fid/fid", "fid")
    names = {path.name for path in (sweep / "figures").iterdir()}
    assert {"fits.json", "pareto.png", "loss_over_compute.svg", "fid_fid_over_loss.png"} <= names
    fits = json.loads((sweep / "figures" / "fits.json").read_text())
    assert fits["held_out"]["run"] == "depth-4" and fits["runs"] == 5
    assert "5 losses at [5, 5] inputs for 5 parameters" in fits["L(N, D)"]["left_out"]
    commands.run("mmdit_jax.report", str(sweep), "--along=4")
    fits = json.loads((sweep / "figures" / "fits.json").read_text())
    assert fits["L(N, D)"]["fitted_to"] == "5 losses along the runs"  # of step 6, not 3
    assert len(re.findall("<svg", (sweep / "report.html").read_text())) > 8


@pytest.mark.long
def test_mistakes_are_named(commands, tmp_path):
    cases = {
        "nothing": [],
        "no run": [str(tmp_path)],
        "no output": [str(tmp_path), str(tmp_path)],
        "rank": [str(tmp_path), "--rank=fid"],
    }
    expected = {
        "nothing": "no workdir",
        "no run": "config.json|mmdit_jax.train",
        "no output": "2 workdirs need --output",
        "rank": "--rank=fid|UP,DOWN",
    }
    commands.refuses("mmdit_jax.report", cases, expected)
    assert not list(tmp_path.iterdir())
