"""Input from strangers: the kept corpus, and structured changes to it, against what `fuzz.targets` promises."""

import io
import json
import os
import struct
import zipfile
from functools import cache

import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import targets

SLOW = ("report",)
KEPT = [(target, path.name) for target in targets.TARGETS for path in targets.corpus(target)]


def kept(slow):
    return [pytest.param(*pair, id="/".join(pair)) for pair in KEPT if (pair[0] in SLOW) == slow]


def replay(target, name):
    targets.TARGETS[target]((targets.CORPUS / target / name).read_bytes())


@pytest.mark.parametrize(("target", "name"), kept(slow=False))
def test_the_corpus(target, name):
    replay(target, name)


@pytest.mark.parametrize(("target", "name"), kept(slow=True))
def test_the_corpus_in_whole_reports(target, name):
    replay(target, name)


def test_the_corpus_is_small_and_covers_every_target():
    sizes = [path.stat().st_size for target in targets.TARGETS for path in targets.corpus(target)]
    assert sum(sizes) < 300_000 and {target for target, _ in KEPT} == targets.TARGETS.keys()


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What targets import is there before the clock of a deadline runs."""
    for target in targets.TARGETS.keys() - set(SLOW):
        replay(target, targets.corpus(target)[0].name)


def fuzz(examples):
    """So many examples, times what AFTERIMAGE_FUZZ says, none of which may hang: a minute is for busy machines."""
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    examples *= int(os.environ.get("AFTERIMAGE_FUZZ", "1"))
    return settings(max_examples=examples, deadline=60_000, suppress_health_check=unhealthy)


@cache
def seeds(target):
    return [path.read_bytes() for path in targets.corpus(target)]


@st.composite
def damaged(draw, target):
    """A kept input with bytes changed, cut out, or put in twice."""
    content = bytearray(draw(st.sampled_from(seeds(target))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["byte", "word", "cut", "twice", "end"])):
            case "byte":
                content[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "word":
                content[place : place + 4] = draw(
                    st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
                )
            case "cut":
                del content[place : place + draw(st.integers(1, 64))]
            case "twice":
                content[place:place] = content[place : place + draw(st.integers(1, 64))]
            case "end":
                del content[place:]
    return bytes(content)


@pytest.mark.parametrize("target", ["image", "pairs", "weights", "study"])
def test_damaged_bytes(target):
    @fuzz(40)
    @given(damaged(target))
    def check(content):
        targets.TARGETS[target](content)

    check()


NAMES = st.sampled_from(
    [
        "",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "<script>alert(1)</script>",
        "=1+1",
        "@x",
        "-x",
        "a\0b",
        "a\nb",
        "\\input{x}",
        "{{ x }}",
        "\u202e",
        "x" * 3000,
        "é" * 90,
        "resnet18",
        "layer1",
        targets.MODEL,
    ]
) | st.text(max_size=8)
NUMBERS = (
    st.sampled_from([0, -1, 1, 10**9, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e-320, 1e308, -1e308])
    | st.floats()
)
PLAIN = st.booleans() | NUMBERS | NAMES
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
SOURCES = st.lists(
    st.sampled_from([f"{targets.MODEL}:layer1", f"{targets.MODEL}:layer2", "resnet18:x", "a:b:c", "nothing"])
    | NAMES,
    max_size=3,
)
DECODERS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["linear", "attention", "transposed", "wavelet", "frequency", "residual"])
        | NAMES
    },
    optional={
        "parameters": st.sampled_from(["250k", "1.5M", "1e9", 1000, 10**10]) | VALUES,
        "options": st.dictionaries(
            st.sampled_from(
                [
                    "blocks",
                    "width",
                    "kernel",
                    "window",
                    "depth",
                    "heads",
                    "mlp_ratio",
                    "channels",
                    "minimum_channels",
                    "rows_per_input",
                ]
            ),
            VALUES,
            max_size=2,
        ),
    },
)
STUDIES = st.fixed_dictionaries(
    {"sources": SOURCES},
    optional={
        "title": VALUES,
        "seeds": st.lists(st.integers(-(2**70), 2**70), max_size=2) | VALUES,
        "weights": NAMES | VALUES,
        "decoders": st.lists(DECODERS, max_size=2) | VALUES,
        "decoder": DECODERS | VALUES,
        "lpips": NAMES,
        "seed": NUMBERS,
        "parameters": VALUES,
        "fusion": st.dictionaries(st.sampled_from(["name", "channels", "size"]), VALUES),
        "data": st.dictionaries(
            st.sampled_from(
                ["source", "test", "resize", "crop", "validation_fraction", "split_seed", "limit_test"]
            ),
            VALUES,
        ),
        "recipe": st.dictionaries(
            st.sampled_from(
                ["epochs", "batch_size", "learning_rate", "loss", "augment", "precision", "plateau_factor"]
            ),
            VALUES,
        ),
        "rows": st.lists(
            st.fixed_dictionaries({"sources": SOURCES}, optional={"decoders": st.lists(DECODERS)}), max_size=2
        ),
        "baseline": VALUES,
        "model": NAMES,
        "layers": SOURCES,
        "attackers": VALUES,
        "limits": VALUES,
        "mean": VALUES,
        "steps": VALUES,
        "unknown": VALUES,
    },
)


@fuzz(100)
@given(STUDIES)
@example({"sources": ["a:b"], "seeds": [10**400]})
@example({"sources": ["a:b"], "recipe": {"learning_rate": 10**400}})
def test_studies_of_odd_values(value):
    try:
        text = tomli_w.dumps(value).encode()
    except (ValueError, UnicodeEncodeError):  # no TOML can say it
        return
    targets.study(text)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 9000, "[a" + ".b" * 3000 + "]", "a = " + "{b=" * 3000, "x" * 10**6]
)
def test_deep_and_long_studies(text):
    targets.study(text.encode())


ODD = st.none() | VALUES.filter(lambda value: value != 10**400)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def changed(draw, value):
    """A JSON value with up to three of its places replaced or taken out."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in places(value) if place] or [("",)]))
        inner = value
        for key in path:
            inner = inner[key]
        if draw(st.booleans()) and isinstance(inner, dict):
            inner.pop(last, None)
        elif isinstance(inner, dict | list) and (isinstance(inner, dict) or inner):
            inner[last] = draw(ODD)
    return value


CELLS = st.sampled_from(["", "nan", "inf", "-1", "1e999", "9" * 400, "=1+1", "a,b", '"', "\0", "<b>", "١"])


@st.composite
def tables(draw, text):
    """A CSV text with cells, a header or line ends changed."""
    lines = [line.split(",") for line in text.decode().splitlines()]
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.sampled_from(lines))
        line[draw(st.integers(0, len(line) - 1))] = draw(CELLS)
    return "\n".join(",".join(line) for line in lines[: draw(st.integers(0, len(lines)))])


@cache
def run_files():
    """The files of a sound run, with controls."""
    with_controls = targets.unbundle((targets.CORPUS / "run" / "controls").read_bytes())
    return {k: v for k, v in (targets._good() | with_controls).items() if k.endswith((".json", ".csv"))}


@st.composite
def foreign_runs(draw):
    files = run_files()
    names = draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True))
    made = {}
    for name in names:
        if name.endswith(".csv"):
            made[name] = draw(tables(files[name])).encode("utf-8", "replace")
        else:
            made[name] = json.dumps(
                draw(changed(json.loads(files[name])) | ODD), ensure_ascii=draw(st.booleans())
            )
    return targets.bundle(
        {k: v if isinstance(v, bytes) else v.encode("utf-8", "replace") for k, v in made.items()}
    )


@fuzz(50)
@given(foreign_runs())
def test_foreign_run_folders(content):
    targets.run(content)


@fuzz(15)
@given(foreign_runs())
def test_foreign_run_folders_are_verified(content):
    parts = targets.unbundle((targets.CORPUS / "verify" / "baseline").read_bytes())
    targets.verify(targets.bundle(parts | targets.unbundle(content)))


@fuzz(4)
@given(foreign_runs())
def test_reports_of_foreign_run_folders(content):
    targets.report(content)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5).map(tuple)
TYPES = ["u1", "i8", "f2", "f4", "f8", "c8", "?", "M8[s]", "m8[s]", "U3", "S3", "V2", ">f4"]


@fuzz(60)
@given(
    st.dictionaries(
        st.sampled_from(["images", "images", "features", "features.a", "features.", "ids", "../x", ""]),
        st.tuples(SHAPES, st.sampled_from(TYPES), st.integers(0, 2**32 - 1)),
        max_size=4,
    )
)
def test_stores_of_odd_arrays(parts):
    arrays = {"images": np.zeros((8, 3, 2, 2), np.uint8), "features": np.ones((8, 2), np.float32)}
    for name, (shape, kind, seed) in parts.items():
        content = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(kind).itemsize)
        arrays[name] = np.frombuffer(content, kind).reshape(shape) if content else np.zeros(shape, kind)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    targets.pairs(file.getvalue())


HEADERS = st.dictionaries(
    st.sampled_from(["a", "images", "features", "__metadata__", ""]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(
                ["U8", "I64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "BOOL", ""]
            ),
            "shape": st.lists(st.sampled_from([0, 1, 2, 4, 8, 2**32, 2**63, -1]), max_size=4),
            "data_offsets": st.lists(st.sampled_from([0, 1, 8, 16, 32, 64, 2**63]), min_size=2, max_size=2),
        }
    )
    | VALUES,
    max_size=3,
)


@fuzz(80)
@given(HEADERS, st.sampled_from([0, 8, 16, 32, 64]))
def test_safetensors_of_odd_headers(header, size):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(size)
    targets.weights(content)
    targets.pairs(content)
