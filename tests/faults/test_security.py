"""No code comes from data: what the product may call, walked over its source, and what is refused.

Three things run code that the user names, on purpose: the config file (--config), a function by its
import path (--filter, --embedding) and the TorchScript file of SSCD (--embedding=sscd:FILE).
"""

import ast
import io
import json
import os
import struct
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.samples import Options, Rejected
from data_pipelines.sources import entries, tfds
from data_pipelines.sources.folders import Folder
from data_pipelines.sources.tars import Tars
from data_pipelines.stages import images
from data_pipelines.stages.filters import Rules
from mmdit_jax.encoders import folder as hf_folder
from mmdit_jax.encoders.text import load_tokenizer
from tests.data_pipelines.making import OPTIONS, picture, reasons, told, write_tar
from tests.faults.mutations import time_limit

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("mmdit_jax", "data_pipelines", "configs")
    for path in (ROOT / folder).rglob("*.py")
)
# Modules whose purpose is to make objects, or processes, of bytes and text.
MODULES = set(
    "pickle _pickle cloudpickle dill joblib marshal shelve runpy importlib subprocess".split()
)
MODULES |= {"yaml", "code", "codeop", "ctypes", "pty", "zipfile"}
NAMES = {"eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"}
METHODS = {"extract", "extractall", "unpack_archive", "system", "popen", "execv", "execve", "spawn"}
METHODS |= {"literal_eval", "from_pretrained", "unpackb"}
ALLOWED = {
    "mmdit_jax/command.py": {"runpy"},  # the config file
    "mmdit_jax/sweep.py": {"runpy"},  # the same
    # --filter, --embedding: a function of the user's
    "data_pipelines/stages/filters.py": {"importlib"},
    # SSCD is a TorchScript
    "data_pipelines/stages/embeddings.py": {"importlib.util", "torch.jit.load"},
    "mmdit_jax/training/workdir.py": {"importlib.metadata"},
    "mmdit_jax/training/executable.py": {"importlib.metadata"},
    "mmdit_jax/benchmark.py": {"subprocess"},  # itself, with diffusers in place of flax
    "mmdit_jax/scaling/execution.py": {"subprocess"},  # the commands of a sweep
    "mmdit_jax/evaluation/frechet.py": {"zipfile"},  # the name of its error
    # Only whether torch is there; trust_remote_code=False, use_safetensors=True.
    "mmdit_jax/evaluation/detection.py": {"importlib.util", "from_pretrained"},
    # Signal handlers that also run while the main thread is inside a library.
    "mmdit_jax/hosts.py": {"ctypes"},
    "mmdit_jax/training/preemption.py": {"ctypes"},
    "mmdit_jax/flow/named.py": {"literal_eval"},  # numbers only
    "mmdit_jax/encoders/text.py": {"from_pretrained"},  # trust_remote_code=False, see below
    "mmdit_jax/weights.py": {"extract"},  # bundle.extract, which is ours
    "mmdit_jax/data/record_process.py": {"subprocess"},  # itself, with the path of a shard
    "mmdit_jax/data/records.py": {"unpackb"},  # with limits, see test_fuzzing_data
}


def suspicious(tree):
    """What a file imports or calls that could make code, or any object, of bytes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                called in NAMES
                or (called != name and name in METHODS)
                or called.endswith("torch.load")
            ):
                yield name if called != "torch.load" else called
            if called == "torch.jit.load" or keywords.get("shell") == "True":
                yield called
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                yield called
            if (
                keywords.get("allow_pickle") == "True"
                or keywords.get("trust_remote_code") == "True"
            ):
                yield called
            if name == "from_pretrained" and keywords.get("trust_remote_code") != "False":
                yield "from_pretrained without trust_remote_code=False"
            if called == "Image.open" and "formats" not in keywords:
                yield "Image.open of any format"


def test_no_file_makes_code_or_objects_of_bytes():
    unexpected = {}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        found = set(suspicious(ast.parse(path.read_text(encoding="utf-8"))))
        if found - ALLOWED.get(name, set()):
            unexpected[name] = found
    assert not unexpected


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import os.path, marshal as m",
        "torch.load('x')",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml = __import__('yaml')",
        "x = eval('1')",
        "archive.extractall('.')",
        "subprocess.run('ls', shell=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "Image.open(file)",
        "os.system('ls')",
    ],
)
def test_the_walk_finds_what_it_looks_for(line):
    assert set(suspicious(ast.parse(line)))


# Programs that data brings along


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that nobody may import."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "springs.py").write_text("raise SystemExit('code of the data ran')\n")
    monkeypatch.syspath_prepend(tmp_path / "trap")
    yield "springs.Feature"
    assert "springs" not in sys.modules


@pytest.mark.parametrize("inside", [lambda name: name, lambda name: {"a": [{"b": name}]}])
def test_a_prepared_data_set_that_names_its_own_python_class_is_refused(tmp_path, trap, inside):
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    features = {"pythonClassName": trap, "json": {"json": "{}"}}
    nested = inside(features) if inside("x") != "x" else features
    for content in (nested, {"type": trap, "content": {}}, {"content": json.dumps(features)}):
        (folder / "features.json").write_text(json.dumps(content))
        (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "version": "1.0.0"}))
        with pytest.raises(ValueError, match="names the class 'springs.Feature', whose code"):
            tfds.Tfds(f"mine@{tmp_path}", OPTIONS)


def test_a_data_set_that_is_a_program_of_a_namespace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="program of a namespace"):
        tfds.Tfds(f"somebody:mine@{tmp_path}", OPTIONS)


def test_a_tokenizer_that_brings_code_is_refused_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    code = "open({!r}, 'w')\nclass Tokenizer: pass\n".format(str(tmp_path / "ran"))
    (tmp_path / "tokenization_mine.py").write_text(code)
    config = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", **config}))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# Sizes of networks


@pytest.mark.parametrize("value", [10**9, 0, -1, 1.5, "2", None, True, [3], 10**400])
def test_a_network_of_impossible_size_is_refused_before_it_is_made(value):
    for key in ("num_hidden_layers", "hidden_size", "layers_per_block", "vocab_size"):
        if (key, value) in (("hidden_size", 10**9), ("vocab_size", 10**9)) or value != 10**9:
            with pytest.raises(ValueError, match=f"has {key}="):
                hf_folder.field({key: value}, key, "folder")


# Pictures


def png(width, height, *, color_type=2, depth=8, extra=b""):
    """A PNG of one value, a thousand times smaller than its pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    bands = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    row = bytes(1 + width * bands * depth // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"zTXt", b"Comment\0\0" + extra) if extra else b"")
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def rejection(data):
    with pytest.raises(Rejected) as caught, time_limit(5):
        images.decode(data, (8, 8))
    return caught.value.reason


def test_bombs_are_rejected_and_not_unpacked():
    """Too many pixels, a text that unpacks to 64 MB, a JPEG of a thousand scans."""
    tracemalloc.start()
    for side in (10_000, 20_000):  # of the smaller one Pillow itself would only warn
        huge = png(side, 1)  # the header says what is never unpacked
        huge = huge[:16] + struct.pack(">II", side, side) + huge[24:]
        huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
        assert rejection(huge) == "too_large"
    text = zlib.compress(bytes(64 << 20))
    tracemalloc.reset_peak()
    assert rejection(png(8, 8, extra=text)) == "corrupt"
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()

    file = io.BytesIO()
    Image.new("RGB", (256, 256)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(images.SCAN)
    assert images.decode(data).size == (256, 256)
    assert rejection(data[:-2] + data[last:-2] * 1000 + data[-2:]) == "too_large"


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "ICNS", "SGI"])
def test_only_the_promised_formats_are_tried(kind):
    """Pillow starts Ghostscript for the first of these; nobody needs the others."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, kind)
    assert rejection(file.getvalue()) == "corrupt"


def test_every_extension_of_a_source_belongs_to_a_format_that_is_tried():
    from data_pipelines.sources.folders import IMAGE_EXTENSIONS

    Image.init()
    kinds = {Image.EXTENSION.get(extension) for extension in IMAGE_EXTENSIONS}
    assert kinds - {None} <= set(images.FORMATS)


def test_few_large_pictures_are_unpacked_at_once(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100)
    inside, most, lock = 0, 0, threading.Lock()
    load = Image.Image.load

    def counted(image):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.02)
        try:
            return load(image)
        finally:
            with lock:
                inside -= 1

    data = picture(1, "BMP")
    from PIL import BmpImagePlugin

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", counted)
    threads = [threading.Thread(target=images.decode, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= images.LARGE_AT_ONCE


def test_sixteen_bits_become_eight_by_the_table_as_by_the_formula():
    values = np.arange(65536)
    np.testing.assert_array_equal(images._EIGHT_BITS, (values * 255 + 32767) // 65535)


# Paths and files


def test_what_never_ends_is_not_read(tmp_path):
    """A pipe in the place of a caption file, of a text beside a picture, and of a picture."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(1))
    os.mkfifo(tmp_path / "captions.jsonl")
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "c.png")
    os.symlink("/dev/zero", tmp_path / "b.txt")
    with time_limit(5):
        found = reasons(Folder(str(tmp_path), OPTIONS))
    assert found == {
        "captions.jsonl": "unreadable",
        "a.png": "unreadable",
        "b.png": "unreadable",
        "c.png": "unreadable",
    }


def test_paths_that_no_file_can_have_cost_their_line_only(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    lines = [
        {"file": "a.png", "caption": "good", "aesthetic": 10**400},
        {"file": "\ud800.png", "caption": "x"},
        {"file": "a\0.png", "caption": "x"},
        {"file": "x" * 5000, "caption": "x"},
        {"file": "/etc/passwd", "caption": "x"},
        {"file": "sub/../../a.png", "caption": "x"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = Folder(str(tmp_path), Options(resolution=16, fields=None))
    assert told(source) == {"a.png": [("good", "original")]}
    with pytest.raises(Rejected, match="no_score"):  # a number that is no float
        Rules(score="aesthetic>=5").before(source.samples[0])
    assert [case.reason for case in source.dropped] == [
        *("bad_caption", "bad_caption", "outside", "outside", "unreadable")
    ]


def test_a_line_without_end_is_one_bad_line(monkeypatch):
    monkeypatch.setattr(entries, "MAX_LINE_BYTES", 8)
    lines = list(entries.lines(io.BytesIO(b"1234567\n" + b"x" * 100 + b"\n12\n1234567")))
    assert lines == [b"1234567\n", b"x" * 8, b"12\n", b"1234567"]


def test_members_that_point_outside_are_dropped(tmp_path):
    names = ("/etc/a.png", "../b.png", "x/../../c.png", "./d.png")
    members = [(name, picture(1)) for name in names]
    members += [(name.replace(".png", ".txt"), b"text") for name in names]
    source = Tars(str(write_tar(tmp_path / "x.tar", members)), OPTIONS)
    assert list(told(source)) == ["x.tar/./d"]
    assert set(reasons(source).values()) == {"outside"} and len(source.dropped) == 6


def test_a_member_of_negative_size_does_not_lead_around_for_ever(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(1)), ("a.txt", b"a"), ("b.png", b"b")])
    data = bytearray(path.read_bytes())
    start = data.index(b"b.png")
    for size in (-1024, -512, -1):
        data[start + 124 : start + 136] = b"\xff\xff\xff\xff" + struct.pack(">q", size)
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(data)
        with time_limit(5):
            source = Tars(str(path), OPTIONS)
        assert list(told(source)) == ["x.tar/a"]
        assert reasons(source)["x.tar"] == "corrupt_shard"
