"""Files of weights as strangers have them: read by what they hold, never unpickled, and refused with the reason."""

import argparse
import collections
import contextlib
import datetime
import enum
import io
import json
import os
import pathlib
import pickle
import pickletools
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from afterimage.config import AfterimageError
from afterimage.models import unpickling
from afterimage.models.weight_files import read_named_tensors
from afterimage.models.weights import file_digest

STATE = {
    "conv1.weight": torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
    "bn1.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bn1.num_batches_tracked": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


class Colour(enum.Enum):
    RED = 1


class Settings:
    def __init__(self):
        self.rate = 0.1


class Attributes(dict):
    """A dictionary of a class of its own, as configuration libraries have them."""


class Special(torch.Tensor):
    """A tensor of a class of its own."""


def companions():
    """What trainings leave beside the tensors."""
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    defaults = collections.defaultdict(list, {"loss": [0.5, 0.25]})
    return {
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("runs"), when=datetime.datetime(2020, 1, 2)),
        "best": np.float64(77.5),
        "history": np.arange(6).reshape(2, 3),
        "words": np.array(["a", "b"]),
        "optimizer": optimizer.state_dict(),
        "losses": defaults,
        "seen": {1, 2, frozenset([3])},
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cuda:3"),
        "colour": Colour.RED,
        "settings": Settings(),
        "attributes": Attributes(a=1),
        "counter": collections.Counter("abca"),
        "random": np.random.RandomState(0).get_state(),
        "zone": datetime.UTC,
        "loss": torch.nn.functional.cross_entropy,
        "nothing": None,
        "bytes": b"\xff\0",
        "complex": 1j,
        "large": 2**200,
    }


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def read_weights(file):
    """The tensors in `state_dict` or `model`, or else those in the outermost dictionary."""
    found = read_named_tensors(file)
    inner = next((c for c in ("state_dict.", "model.") if c in found.containers.values()), "")
    return {
        name.removeprefix(inner): tensor
        for name, tensor in found.tensors.items()
        if found.containers[name] == inner
    }


def same(found, state=STATE):
    assert found.keys() == state.keys()
    assert all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in state.items()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"_use_new_zipfile_serialization": False},
        {"pickle_protocol": 4},
        {"pickle_protocol": 5},
        {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".ckpt", ".safetensors"])
def test_tensors_are_read_with_whatever_lies_beside_them(tmp_path, suffix, options):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(saved({"state_dict": STATE, **companions()}, **options))
    same(read_weights(file))
    found = read_named_tensors(file)
    assert {"argparse.Namespace", "numpy.core.multiarray.scalar"} <= set(found.unread)
    assert torch.equal(found.tensors["history"], torch.arange(6).view(2, 3))
    assert torch.equal(found.tensors["optimizer.state.0.exp_avg"], torch.full((2, 3), 0.1))


def test_every_kind_of_tensor_is_what_torch_reads(tmp_path):
    """Against torch's own reader, in both of its formats: shared storages, views, parameters, subclasses."""
    base = torch.arange(12.0)
    state = {
        "base": base, "view": base[3:7], "strided": base.view(3, 4).t(), "expanded": base[:1].expand(5),
        "parameter": torch.nn.Parameter(base + 1), "buffer": torch.nn.Buffer(base + 2), "scalar": torch.tensor(1.5),
        "double": base.double(), "half": base.half(), "byte": base.byte(), "bool": base > 3, "complex": base + 1j,
        "short": base.short(), "char": base.char(), "int": base.int(), "float8": base.to(torch.float8_e4m3fn),
        "uint16": base.to(torch.uint16), "transposed": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip
    state["parameter"].mark = "an attribute of its own"
    for legacy in (False, True):
        kept = {k: v for k, v in state.items() if not (legacy and k in ("float8", "uint16"))}
        torch.save(kept, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        reference = torch.load(tmp_path / "x.pth", weights_only=True)
        found = read_named_tensors(tmp_path / "x.pth").tensors
        same(found, reference)
        assert all(found[key].stride() == value.stride() for key, value in reference.items())
        assert found["view"].data_ptr() == found["base"].data_ptr() + 12
    torch.save({"a": base.as_subclass(Special)}, tmp_path / "y.pth")
    assert torch.equal(read_named_tensors(tmp_path / "y.pth").tensors["a"], base)


@pytest.mark.parametrize("legacy", [False, True])
def test_quantised_tensors_are_left_out_and_the_others_read(tmp_path, legacy):
    state = {
        "weight": torch.rand(3, 4),
        "observer": torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8),
    }
    torch.save({"state_dict": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    same(read_named_tensors(tmp_path / "x.pth").tensors, {"state_dict.weight": state["weight"]})


def test_arrays_are_tensors_too(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.array(2.5),
    }
    for protocol in range(2, 6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
        found = read_weights(tmp_path / "x.pkl")
        for key, value in arrays.items():
            np.testing.assert_array_equal(found[key].numpy(), value)
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(STATE))
    same(read_weights(tmp_path / "y.pkl"))


def test_a_pickled_network_has_the_names_of_its_state_dict(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    network.register_buffer("hidden", torch.zeros(1), persistent=False)
    for legacy in (False, True):
        torch.save(network, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        same(read_named_tensors(tmp_path / "x.pth").tensors, network.state_dict())
    torch.save({"model": torch.nn.DataParallel(network)}, tmp_path / "x.pth")
    found = read_named_tensors(tmp_path / "x.pth")
    same(found.tensors, {f"model.module.{key}": value for key, value in network.state_dict().items()})
    assert set(found.containers.values()) == {"model."}


def test_shards(tmp_path):
    parts = [dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for part, name in zip(parts, names, strict=True):
        save_file({key: value.contiguous() for key, value in part.items()}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    table = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    same(read_weights(index))
    before = file_digest(index)
    save_file({key: value.contiguous() + 1 for key, value in parts[1].items()}, tmp_path / names[1])
    assert file_digest(index) != before
    (tmp_path / names[1]).unlink()
    with pytest.raises(AfterimageError, match=rf"index.json lists {names[1]}, which .* lacks"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(AfterimageError, match="which is not beside it"):
        file_digest(index)
    index.write_text("{}")
    with pytest.raises(AfterimageError, match="no table weight_map"):
        read_weights(index)


def a_zip(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def a_program():
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    return stream.getvalue()


LARGE = {"a": torch.zeros(1000)}
REFUSED = {
    "a Git LFS pointer to the file; fetch that with `git lfs pull`": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46807446\n"
    ),
    "a web page, saved in place of the file": b"\n<!DOCTYPE html><head><title>Sign in</title></head>",
    "it is empty": b"",
    "a zip file of 1 files (resnet18.pth)": a_zip(**{"resnet18.pth": saved(LARGE)}),
    "a TorchScript archive": a_program(),
    'its 33 bytes begin with b\'{"error": "Repository not found"}\', which no': b'{"error": "Repository not found"}',
    r"its 2,000 bytes begin with b'\x00\x00": bytes(2000),
    "damaged or truncated at 2,000 bytes (the list at the end of a zip file is missing)": saved(LARGE)[:2000],
    "damaged or truncated at 2,000 bytes (SafetensorError": save(LARGE)[:2000],
    "damaged or truncated at 300 bytes": saved(LARGE, _use_new_zipfile_serialization=False)[:300],
    "no named tensors: it is a dict with epoch": saved({"epoch": 3}),
    "no named tensors: it is a list": saved([torch.zeros(1)]),
    "no named tensors: it is a Tensor": saved(torch.zeros(1)),
    "not read, as they are no tensors: argparse.Namespace": saved({"args": argparse.Namespace(a=1)}),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_checkpoint_is_told_by_what_it_is(tmp_path, reason, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(REFUSED[reason])
    with pytest.raises(AfterimageError) as error:
        read_weights(file)
    told = str(error.value)
    assert reason in told and str(file) in told and "\n" not in told
    assert "safetensors" in told or "download or save it again" in told


def test_an_archive_that_was_packed_again_is_refused(tmp_path):
    """Its records could be as large as the memory once they are unpacked."""
    with zipfile.ZipFile(io.BytesIO(saved({"state_dict": STATE}))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in files.items():
            archive.writestr(name, value)
    with pytest.raises(AfterimageError, match="its records are compressed"):
        read_weights(tmp_path / "x.pth")


def test_the_content_counts_and_not_the_name(tmp_path):
    (tmp_path / "x.pth").write_bytes(save({k: v.contiguous() for k, v in STATE.items()}))
    (tmp_path / "x.safetensors").write_bytes(saved(STATE))
    same(read_weights(tmp_path / "x.pth"))
    same(read_weights(tmp_path / "x.safetensors"))


WITNESS = "something-was-run"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(*_):
    pathlib.Path(WITNESS).touch()


class Trap:
    """Each of the ways in which unpickling an object may run its class's code."""

    def __new__(cls, *_):
        touch()
        return super().__new__(cls)

    def __setstate__(self, state):
        touch()

    def __setitem__(self, key, value):
        touch()

    def append(self, value):
        touch()

    def __reduce__(self):
        return Trap, (1,), {"a": 1}, iter([1]), iter([("a", 1)])


def trap():
    return object.__new__(Trap)


def hostile():
    """Contents that run something where they are unpickled, each beside tensors."""
    command = f"touch {WITNESS}"
    calls = {
        "system": Call(os.system, command),
        "eval": Call(eval, f"open({WITNESS!r}, 'w')"),
        "exec": Call(exec, f"open({WITNESS!r}, 'w')"),
        "own function": Call(touch),
        "attribute": Call(getattr, Call(__import__, "os"), "system"),
        "class": trap(),
        "torch": Call(torch.hub.load, "owner/name", "model"),
        "numpy": Call(np.load, WITNESS),
        "write": Call(np.save, WITNESS, np.zeros(1)),
    }
    return {name: {**STATE, "extra": value} for name, value in calls.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", hostile())
def test_nothing_that_a_file_names_is_run(tmp_path, monkeypatch, name, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save(hostile()[name], tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    before = sorted(os.listdir(tmp_path))
    commands = name in ("system", "eval", "exec", "attribute")
    if commands:
        with pytest.raises(
            AfterimageError, match=r"it names \S+, which runs commands; nothing in it was run"
        ):
            read_weights(tmp_path / "x.pth")
    else:
        same(read_weights(tmp_path / "x.pth"))
        assert len(read_named_tensors(tmp_path / "x.pth").unread) == (name != "class")
    assert sorted(os.listdir(tmp_path)) == before


def test_classes_and_functions_on_the_stack_are_never_changed(tmp_path):
    """A pickle may set attributes of whatever it names; here it has only names."""
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__call__K\x01sb."
    attack_class = b"\x80\x02ccollections\nOrderedDict\nN}X\x05\x00\x00\x00clearK\x01s\x86b."
    for content in (attack, attack_class):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(AfterimageError):
            read_weights(tmp_path / "x.pkl")
    assert callable(collections.OrderedDict().clear) and torch._utils._rebuild_tensor_v2.__dict__ == {}


OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name != "STOP"]
NAMES = ["os system", "builtins eval", "posix system", "subprocess Popen", "builtins getattr", "torch Tensor",
         "torch.hub load", "shutil rmtree", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
         "numpy.core.multiarray _reconstruct", "numpy dtype", "torch.storage _load_from_bytes",
         "test_weight_files touch", "test_weight_files Trap", "torch FloatStorage"]  # fmt: skip
CALLS = [b"R", b"\x81", b"b", b"s", b"e", b"u", b"a", b"\x92", b"o", b"\x93", b"Q"]
VALUES = [b"(", b"}", b"]", b")", b"\x8f", b"N", b"0", b"1", b"2", b"K\x02", b"\x94"]


@st.composite
def programs(draw):
    """Random instructions: mostly calls of what a stranger would like to be called."""
    parts = [b"\x80\x04"]
    for _ in range(draw(st.integers(1, 30))):
        kind = draw(st.integers(0, 6))
        if kind == 0:
            module, _, name = draw(st.sampled_from(NAMES)).partition(" ")
            parts.append(f"c{module}\n{name}\n".encode())
        elif kind == 1:
            text = f"touch {WITNESS}".encode()
            parts.append(b"(\x8c" + bytes([len(text)]) + text + b"t")
        elif kind == 2:
            parts.append(draw(st.sampled_from(CALLS)))
        elif kind == 3:
            parts.append(draw(st.sampled_from(VALUES)))
        elif kind == 4:
            parts.append(b"h" + bytes([draw(st.integers(0, 5))]))
        elif kind == 5:
            module, _, name = draw(st.sampled_from(NAMES)).partition(" ")
            parts.append(f"(i{module}\n{name}\n".encode())
        else:
            opcode = draw(st.sampled_from(OPCODES))
            parts.append(opcode.code.encode("latin1") + draw(st.binary(max_size=6)))
    return b"".join(parts) + b"."


def test_no_sequence_of_instructions_calls_anything_or_ends_in_another_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def watch(self, module, name, find=unpickling.Reader.find_class):
        found = find(self, module, name)
        assert isinstance(found, torch.dtype) or issubclass(
            found, unpickling.PlaceholderObject | unpickling.Function
        )
        asked.append(found)
        return found

    monkeypatch.setattr(unpickling.Reader, "find_class", watch)

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(), st.booleans())
    def check(content, in_archive):
        if in_archive:
            content = a_zip(**{"archive/data.pkl": content, "archive/data/0": bytes(16)})
        (tmp_path / "x.pth").write_bytes(content)
        with contextlib.suppress(AfterimageError):
            read_weights(tmp_path / "x.pth")
        assert os.listdir(tmp_path) == ["x.pth"]

    check()
    assert asked  # the programs do name what they would call; each name became a stand-in


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("legacy", [False, True])
def test_sizes_that_a_file_does_not_have_are_refused(tmp_path, legacy, place):
    """Neither memory beyond the file nor a tensor beyond its storage: of 13 values, by both numbers that say so."""
    content = saved({"a": torch.zeros(13)}, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        key = next(name for name in files if name.endswith("data.pkl"))
    for number in (b"J\xff\xff\xff\x7f", b"K\x64", b"J\xff\xff\xff\xff"):
        before, middle, after = (content if legacy else files[key]).split(b"K\x0d")
        parts = (
            [before, number, middle, b"K\x0d", after]
            if place == 0
            else [before, b"K\x0d", middle, number, after]
        )
        changed = b"".join(parts) if legacy else a_zip(**{**files, key: b"".join(parts)})
        (tmp_path / "x.pth").write_bytes(changed)
        with pytest.raises(AfterimageError, match="damaged"):
            read_weights(tmp_path / "x.pth")
