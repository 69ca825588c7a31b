"""data_pipelines.verify reads every byte."""

import shutil

from tests.data.making import build


def test_every_byte_is_verified_and_all_bad_shards_are_listed(commands, tmp_path):
    sound, spoiled = tmp_path / "sound", tmp_path / "spoiled"
    build(sound, [(0, 20), (0, 6), (0, 5)], [(0, 5)])
    shutil.copytree(sound, spoiled)
    path = spoiled / "train-00000.arrayrecord"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1  # far from both ends
    path.write_bytes(content)
    (spoiled / "train-00001.arrayrecord").unlink()
    path = spoiled / "validation-00000.arrayrecord"
    path.write_bytes((spoiled / "train-00002.arrayrecord").read_bytes())

    code, output = commands.outcome("data_pipelines.verify", str(sound))
    assert code == 0 and "4 shards with 36 records in " in output and "4/4" in output
    code, output = commands.outcome("data_pipelines.verify", str(spoiled))
    assert code == 2, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    for part in (
        "3 of 4 shards",
        "train-00000.arrayrecord (other contents",
        "train-00001.arrayrecord (No such file",
        "validation-00000.arrayrecord (other contents",
    ):
        assert part in error
    assert "train-00002" not in error and "4/4" in output
    cases = {"none": [], "no data": [f"{tmp_path}/no"]}
    commands.refuses(
        "data_pipelines.verify", cases, {"none": "no data set given", "no data": "not a directory"}
    )
