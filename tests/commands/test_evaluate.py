"""The evaluate command: what it refuses, and the evaluators that need no files."""

import json

import pytest


def test_evaluators_without_their_files_are_refused(commands, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "counting"}\n')
    common = [f"--workdir={tmp_path}", f"--output={tmp_path / 'a.json'}"]
    cases = {
        "none": ["--evaluators=inception"],
        "fid": ["--evaluators=fid"],
        "clip_score": ["--evaluators=clip_score", "--inception=a.safetensors"],
        "no folder": ["--evaluators=clip_score", f"--clip={tmp_path / 'none'}"],
        "geneval": ["--evaluators=val_loss,geneval", f"--geneval_prompts={prompts}"],
        "prompts": [
            "--evaluators=geneval",
            f"--geneval_prompts={prompts}",
            "--detector=a",
            "--clip=b",
        ],
        "two networks": [
            "--evaluators=fid",
            f"--clip={tmp_path}",
            "--inception=a.safetensors",
            f"--reference={tmp_path / 'a.npz'}",
        ],
    }
    cases["sampler"] = ["--evaluators=shapes", "--samplers=50"]
    cases["two ways"] = ["--evaluators=shapes,val_loss", "--samplers=50:2.5"]
    cases["weights"] = ["--evaluators=shapes", "--weights=ema,best"]
    (tmp_path / "a.npz").touch()
    expected = {
        "none": "evaluator inception is unknown|path_length",
        "fid": "--inception=FILE|--clip=FOLDER|docs/evaluation.md",
        "clip_score": "evaluator clip_score needs --clip",
        "no folder": "none does not exist",
        "geneval": "evaluator geneval needs --detector, --clip",
        "prompts": "line 1|'prompt' must be a text",
        "two networks": "a.npz has the statistics of one network",
    }
    expected["sampler"] = "sampler 50 must be STEPS:CFG"
    expected["two ways"] = "--samplers=50:2.5 does not go with val_loss"
    expected["weights"] = "--weights=best must be ema, raw or ema,raw"
    cases = {name: [*common, *arguments] for name, arguments in cases.items()}
    commands.refuses("mmdit_jax.evaluate", cases, expected)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.long
def test_several_runs_make_one_table(trained, commands, tmp_path):
    output = tmp_path / "table.json"
    text = commands.run(
        "mmdit_jax.evaluate",
        f"--workdir={trained},{trained}/",
        "--evaluators=val_loss,path_length",
        "--grid=paper",
        "--levels=4",
        "--pictures=3",
        "--batch_size=4",
        f"--output={output}",
    )
    runs = json.loads(output.read_text())["runs"]
    first, second = runs.values()
    assert first["val_loss"] == second["val_loss"]
    assert {"loss_t0", "loss_t2"} <= set(first["val_loss"]) and "loss_t3" not in first["val_loss"]
    assert first["settings"]["val_loss"]["grid"] == "paper"
    assert 0 < first["path_length"]["straightness"] <= 1 + 1e-6
    assert first["settings"]["path_length"]["prompts"] == 3
    assert f"| {trained.name} | - | - | - |" in text


@pytest.mark.long
def test_several_samplers_and_weights_are_what_each_is_alone(trained, commands, tmp_path):
    def evaluate(*arguments):
        output = tmp_path / "out.json"
        common = [f"--workdir={trained}", "--evaluators=shapes", "--pictures_per_category=1"]
        common += ["--batch_size=8", f"--output={output}", *arguments]
        commands.run("mmdit_jax.evaluate", *common)
        return json.loads(output.read_text())

    found = evaluate("--samplers=2:1,1:3", "--weights=ema,raw")["each"]
    settings = [content["settings"] for content in found]
    assert [(s["shapes"]["steps"], s["shapes"]["cfg"], s["weights"]) for s in settings] == [
        (2, 1.0, "ema"),
        (2, 1.0, "raw"),
        (1, 3.0, "ema"),
        (1, 3.0, "raw"),
    ]
    assert evaluate("--steps=1", "--cfg=3", "--weights=raw") == found[3]
