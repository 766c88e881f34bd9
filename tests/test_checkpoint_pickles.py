"""Files that would run code, MMEngine's records, damaged files."""

import codecs
import copyreg
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from msrcnn_d2.checkpoint.conversion import read_weights
from msrcnn_d2.checkpoint.pickles import SafeUnpickler
from msrcnn_d2.checkpoint.reading import read_file
from msrcnn_d2.utils.errors import UserError
from tests.helpers.weights import (
    GOOD,
    MMDETECTION,
    Calls,
    arrays,
    assert_has,
    load,
    pickled,
    renamed,
    saved,
    torch_bytes,
    weights_for,
)

# ---- files that would run code


def touch(marker):
    return f"touch {marker}"


def python(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def text(value):
    """An opcode with a string that all protocols know."""
    data = str(value).encode()
    return b"X" + struct.pack("<I", len(data)) + data


def reduced(function, marker, argument=touch, protocol=2):
    return pickle.dumps({"model": {"a": Calls(function, argument(marker))}}, protocol)


def inside_torch_load(marker):
    buffer = io.BytesIO()
    torch.save(Calls(os.system, touch(marker)), buffer)
    return pickle.dumps(Calls(torch.storage._load_from_bytes, buffer.getvalue()), 2)


def getattr_chain(marker):
    """getattr(__import__("os"), "system")(...), opcode by opcode."""
    imported = b"c__builtin__\n__import__\n" + text("os") + b"\x85R"
    system = b"c__builtin__\ngetattr\n" + imported + text("system") + b"\x86R"
    return b"\x80\x02" + system + text(touch(marker)) + b"\x85R."


def object_array(marker):
    array = np.empty(1, dtype=object)
    array[0] = Calls(os.system, touch(marker))
    return pickle.dumps({"model": {"a": array}}, 2)


def object_scalar(marker):
    scalar = np.float64(1).__reduce__()[0]
    return pickle.dumps(Calls(scalar, np.dtype("O"), Calls(os.system, touch(marker))), 2)


def extension(marker):
    copyreg.add_extension("os", "system", 240)
    return b"\x80\x02\x82\xf0" + text(touch(marker)) + b"\x85R."


def in_the_optimizer(marker):
    evil = {"state": {0: [Calls(os.system, touch(marker))]}}
    return pickle.dumps({"model": {"a": np.ones(1)}, "optimizer": evil}, 2)


def run_string(marker):
    from numpy.testing._private.utils import runstring

    return pickle.dumps(Calls(runstring, python(marker), {}), 2)


# What pickle.loads would run, and what the message has to name in a .pkl and in a .pth. PyTorch's
# reader does not even know some of the operations.
ATTACKS = {
    "os.system": (lambda m: b"cos\nsystem\n" + text(touch(m)) + b"\x85R.", "os.system", ""),
    "posix.system": (lambda m: reduced(os.system, m), "posix.system|nt.system", ""),
    "eval": (lambda m: reduced(eval, m, python), "eval", ""),
    "exec": (lambda m: reduced(exec, m, python), "exec", ""),
    "popen": (
        lambda m: reduced(subprocess.Popen, m, lambda m: ["touch", str(m)]),
        "subprocess.Popen|commands.Popen",  # what Python 2 called it
        "",
    ),
    "getattr": (getattr_chain, "getattr", "getattr|__import__"),
    **{
        f"protocol {n}": (
            lambda m, n=n: reduced(os.system, m, protocol=n),
            "posix.system|nt.system",
            operation,
        )
        for n, operation in ((0, "operation"), (4, "operation FRAME"), (5, "operation FRAME"))
    },
    "INST": (
        lambda m: b"\x80\x02(" + text(touch(m)) + b"ios\nsystem\n.",
        "os.system",
        "operation INST",
    ),
    "OBJ": (lambda m: b"\x80\x02(cos\nsystem\n" + text(touch(m)) + b"o.", "os.system", ""),
    "EXT1": (extension, "os.system", "operation EXT1"),
    "optimizer": (in_the_optimizer, "posix.system|nt.system", ""),
    "object array": (object_array, "numpy.dtype of O|system", "numpy.dtype of O|system"),
    "object scalar": (object_scalar, "numpy.dtype of O", "numpy.dtype of O|system"),
    "runstring": (run_string, "numpy.testing._private.utils.runstring", ""),
    "torch.load": (inside_torch_load, "torch.storage._load_from_bytes", ""),
}


def in_zip(data):
    """A file of PyTorch whose pickle is `data`."""
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))
    return result.getvalue()


def in_legacy(data):
    """A file of PyTorch before 1.6: pickles one after the other."""
    head = [torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(x, 2) for x in head) + data + pickle.dumps([], 2)


CONTAINERS = {"pkl": lambda x: x, "zip": in_zip, "legacy": in_legacy}


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "it_ran"
    if ("os", "system") in copyreg._extension_registry:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack, container, marker, tmp_path):
    make, named, named_by_torch = ATTACKS[attack]
    file = tmp_path / ("x.pkl" if container == "pkl" else "x.pth")
    file.write_bytes(CONTAINERS[container](make(marker)))
    with pytest.raises(UserError) as caught:
        read_weights(str(file))
    assert not marker.exists()
    name = named if container == "pkl" else named_by_torch or named
    message = str(caught.value)
    assert re.search(rf"is refused, since it contains '[^']*({name})", message), message


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_would_work(attack, marker):
    """Without a guard all of them run: the test above proves something."""
    process = None
    try:
        process = pickle.loads(ATTACKS[attack][0](marker))
    except TypeError:  # after it ran: an integer is no array
        pass
    if attack == "popen":
        process["model"]["a"].wait()
    assert marker.exists()


# Not all of them could be run here, but none of them is data
NAMES = [
    ("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"),
    ("builtins", "open"), ("nt", "system"), ("functools", "partial"),
    ("operator", "attrgetter"), ("_pickle", "loads"),
    ("importlib", "import_module"), ("torch", "load"), ("torch.hub", "load"), ("numpy", "load"),
    ("torch.storage", "_load_from_bytes"), ("numpy.core.multiarray", "fromfile"),
    ("numpy", "ndarray.tofile"), ("collections", "OrderedDict.fromkeys"), ("numpy", "memmap"),
    ("msrcnn_d2.checkpoint.reading", "read_file"), ("_codecs", "lookup"),
    ("collections", "Counter"), ("torch._utils", "_rebuild_tensor_v2"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
]  # fmt: skip


@pytest.mark.parametrize("module, name", NAMES)
def test_pickles_know_nothing_else(module, name, tmp_path):
    data = {
        2: b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".",
        4: b"\x80\x04" + text(module) + text(name) + b"\x93.",
    }
    for protocol in data:
        (tmp_path / "x.pkl").write_bytes(data[protocol])
        with pytest.raises(UserError, match=f"it contains '{re.escape(module)}.{re.escape(name)}'"):
            read_file(str(tmp_path / "x.pkl"))


def test_persistent_ids(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + text("storage") + b"Q.")
    with pytest.raises(UserError, match="a reference to something outside of the file"):
        read_file(str(tmp_path / "x.pkl"))


def pickled_part(value):
    """The opcodes that make a value, without the protocol, the memo and the end."""
    return re.sub(rb"q.", b"", pickle.dumps(value, 2)[2:-1], flags=re.S)


DTYPE, BUILD = b"cnumpy\ndtype\n", b"b"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + b"K\x00\x85C\x01btR"
F4 = DTYPE + text("f4") + b"\x89\x88\x87R"
TWO = b"C\x08" + np.ones(2, "f4").tobytes()
STATE = b"(K\x01K\x02\x85" + F4 + b"\x89" + TWO + b"t"
# A state of an object type that says that it needs no care: bytes as addresses of objects
CARELESS = b"(K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
MEMORY = {
    "objects from bytes": (
        b"cnumpy.core.multiarray\nscalar\n" + DTYPE + text("O8") + b"\x89\x88\x87R" + CARELESS
        + TWO + b"\x86R",
        "numpy.dtype of O8",
    ),
    "a structure": (DTYPE + text("f4,O") + b"\x89\x88\x87R", "numpy.dtype of f4,O"),
    "fields": (DTYPE + text("V8") + b"\x89\x88\x87R", "numpy.dtype of V8"),
    "a type by class": (DTYPE + b"cnumpy\nndarray\n\x85R", "numpy.dtype of"),
    "list as data": (
        EMPTY + b"(K\x01K\x02\x85" + F4 + b"\x89]tb", "numpy.ndarray of list",
    ),
    "an array filled twice": (EMPTY + STATE + BUILD + STATE + BUILD, "a change of numpy.ndarray"),
    "a view of an array": (
        b"cnumpy.core.numeric\n_frombuffer\n(" + EMPTY + STATE + BUILD + F4 + b"K\x02\x85"
        + text("C") + b"tR",
        "numpy.ndarray of _Array",
    ),
    "an array without data": (b"cnumpy\nndarray\nK\x09\x85\x85R", "numpy.ndarray in a way"),
    "an array of real types": (EMPTY + b"(K\x01K\x02\x85" + text("f4") + b"\x89" + TWO + b"tb",
                               "numpy.ndarray of bytes"),
}  # fmt: skip


def for_torch(opcodes):
    """PyTorch's reader knows bytes as text only, which Python 2 wrote."""
    encoded = b"c_codecs\nencode\n%s" + text("latin1") + b"\x86R"
    for data in (TWO, b"C\x01b"):
        opcodes = opcodes.replace(data, encoded % text(data[2:].decode("latin1")))
    return in_zip(b"\x80\x02" + opcodes + b".")


HANDMADE = {"x.pkl": lambda opcodes: b"\x80\x03" + opcodes + b".", "x.pth": for_torch}


@pytest.mark.parametrize("name", HANDMADE)
@pytest.mark.parametrize("case", MEMORY)
def test_arrays_do_not_reach_into_memory(case, name, tmp_path):
    opcodes, message = MEMORY[case]
    (tmp_path / name).write_bytes(HANDMADE[name](opcodes))
    with pytest.raises(UserError, match=message):
        read_file(str(tmp_path / name))


def test_the_handmade_array_is_one(tmp_path):
    """The cases above differ from it in one thing each."""
    for name, make in HANDMADE.items():
        (tmp_path / name).write_bytes(make(EMPTY + STATE + BUILD))
        assert read_file(str(tmp_path / name)).tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(3,), (1,), (-1, -2), (2**62, 4), (0,)])
def test_sizes_that_are_not_those_of_the_data(shape, tmp_path):
    state = b"(K\x01" + pickled_part(shape) + F4 + b"\x89" + TWO + b"tb"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x03" + EMPTY + state + b".")
    with pytest.raises(UserError, match="truncated or damaged"):
        read_file(str(tmp_path / "x.pkl"))


def attributes(value):
    names = ("__dict__", "__defaults__", "__kwdefaults__", "__setstate__", "extra")
    return {k: repr(getattr(value, k, None)) for k in names}


@pytest.mark.parametrize("name", [".".join(x) for x in SafeUnpickler.ALLOWED])
def test_shared_objects_are_not_changed(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    before = attributes(SafeUnpickler.ALLOWED[module, attribute])
    states = [{"extra": 1}, (None, {"extra": 1}), (None, {"__defaults__": (1,)})]
    states += [(None, {"__setstate__": 1}), ({"__wrapped__": 1}, None)]
    for state in states:
        part = pickle.dumps(state, 2)[2:-1]
        data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + part + b"b."
        (tmp_path / "x.pkl").write_bytes(data)
        with pytest.raises(UserError):
            read_file(str(tmp_path / "x.pkl"))
    assert attributes(SafeUnpickler.ALLOWED[module, attribute]) == before


@pytest.mark.parametrize("codec", ["rot13", "zlib_codec", "unicode_escape", "utf-8"])
def test_bytes_in_other_codecs(codec, tmp_path):
    pickled(Calls(codecs.encode, "abc", codec), tmp_path / "x.pkl")
    with pytest.raises(UserError, match=f"_codecs.encode to {codec}"):
        read_file(str(tmp_path / "x.pkl"))


class Ordered:
    """Pickles as an OrderedDict to which the file gives attributes, in the place of methods."""

    def __init__(self, attributes, items=()):
        self.attributes, self.contents = attributes, dict(items)

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.contents.items())


def test_attributes_in_the_place_of_methods(tiny, tmp_path):
    expected = weights_for(tiny)
    hidden = dict.fromkeys(["items", "keys", "get", "values", "pop", "copy"], 3)
    for metadata in (3, {"": 3}, {"": {"version": "x"}}, Ordered({"keys": 3}), {3: {"version": 1}}):
        model = Ordered({**hidden, "_metadata": metadata}, expected.items())
        contents = Ordered(hidden, {"model": model, "meta": Ordered(hidden)})
        load(tiny, saved(contents, tmp_path / "x.pth"))
        assert_has(tiny, expected)


# ---- MMEngine's records of a training run


@pytest.fixture
def mmengine(monkeypatch):
    """What it pickles, as far as that matters here; forgotten before a file is read."""
    names = {
        "HistoryBuffer": "mmengine.logging.history_buffer",
        "ConfigDict": "mmengine.config.config",
    }
    names["Dict"] = "addict.addict"
    result = types.SimpleNamespace()
    for name, module in names.items():
        base = object if name == "HistoryBuffer" else dict
        class_ = type(name, (base,), {"__module__": module, "min": lambda self: 0})
        for parent in (module.split(".")[0], module.rpartition(".")[0], module):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, class_)
        setattr(result, name, class_)
    return result


def mmengine_run(mmengine):
    history = mmengine.HistoryBuffer()
    history.__dict__.update(_log_history=np.arange(3.0), _count_history=np.ones(3), max_length=9)
    history.__dict__["_statistics_methods"] = {"min": Calls(getattr, mmengine.HistoryBuffer, "min")}
    config = mmengine.ConfigDict(a=1, b=mmengine.Dict(c=[2]))
    return {"log": {"loss": history}, "config": config, "seed": 3}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_records_of_mmengine_are_left_out(zipped, mmengine, plain, tmp_path):
    expected = weights_for(plain)
    contents = {"message_hub": mmengine_run(mmengine), "meta": mmengine.ConfigDict(cfg="x = 1")}
    contents["state_dict"] = OrderedDict(renamed(expected, MMDETECTION))
    file = saved(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    load(plain, file)
    assert_has(plain, expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, __import__, setattr])
def test_records_of_mmengine_open_no_door(function, first, mmengine, marker, tmp_path):
    evil = Calls(function, touch(marker) if function is os.system else python(marker))
    run = mmengine_run(mmengine)
    parts = {"evil": evil, "run": run} if first else {"run": run, "evil": evil}
    saved({"state_dict": {"a": torch.ones(1)}, **parts}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"is refused.*{function.__name__}"):
        read_weights(str(tmp_path / "x.pth"))
    assert not marker.exists()


def test_getattr_alone_is_refused(tmp_path):
    saved({"state_dict": {"a": torch.ones(1)}, "x": Calls(getattr, 1, "real")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is refused.*getattr"):
        read_weights(str(tmp_path / "x.pth"))


def test_getattr_beside_mmengines_records_gets_nothing(mmengine, marker, tmp_path):
    """The stand-in for getattr hands out nothing that could be called."""
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    got = b"c__builtin__\ngetattr\n" + history + text("min") + b"\x86R"
    data = b"\x80\x02" + got + text(touch(marker)) + b"\x85R."
    (tmp_path / "x.pth").write_bytes(in_zip(data))
    with pytest.raises(UserError):
        read_weights(str(tmp_path / "x.pth"))
    assert not marker.exists()


# ---- damaged files


def other_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as f:
        f.writestr("readme.txt", "hello")
    return buffer.getvalue()


def torch_script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


FORMATS = {
    "zip": lambda: torch_bytes(GOOD),
    "legacy": lambda: torch_bytes(GOOD, zipped=False),
    "pkl": lambda: pickle.dumps({"model": arrays(GOOD["model"])}, 4),
    "safetensors": lambda: safetensors.torch.save(GOOD["model"]),
}
NOT_WEIGHTS = {
    "empty": (lambda: b"", "is empty: get the file again."),
    "html": (lambda: b"\n<!DOCTYPE html><html></html>", "is a web page (HTML), not weights"),
    "html with a mark": (lambda: b"\xef\xbb\xbf<html></html>", "is a web page (HTML)"),
    "json": (lambda: b'{"message": "Not Found"}', "is not a checkpoint: expected"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
                "is a pointer of Git LFS, not the weights themselves: run `git lfs pull`."),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a checkpoint: expected"),
    "text": (lambda: b"model: x\n", "is not a checkpoint: expected"),
    "config": (lambda: b"cfg = 3\n", "is not a checkpoint: expected"),
    "zeros": (lambda: bytes(1000), "is not a checkpoint: expected"),
    "other zip": (other_zip, "damaged (file in archive is not in a subdirectory: readme.txt)"),
    "torch script": (torch_script, "is a TorchScript archive, a program rather than weights: save"),
    "list": (lambda: torch_bytes([torch.ones(1)]), "it has none."),
    "tensor": (lambda: torch_bytes(torch.ones(1)), "it has none."),
    "no parameters": (lambda: torch_bytes({"model": {}}), "it has none."),
    "numbers": (lambda: torch_bytes({"model": {"a.b": 3}}), "a value of type int as 'a.b'."),
    "nested": (lambda: torch_bytes({"net": {"a": torch.ones(1)}}), "of type dict as 'net'."),
    "texts": (lambda: pickle.dumps({"model": {"a": np.array(["x"])}}), "array of type <U1 as"),
    "complex": (lambda: torch_bytes({"a": torch.ones(1) * 1j}), "a tensor of torch.complex64 as"),
    "sparse": (lambda: torch_bytes({"a": torch.eye(2).to_sparse()}), "a tensor of torch.sparse_c"),
    "meta": (lambda: torch_bytes({"a": torch.ones(1, device="meta")}), "a tensor without values"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_not_weights(case, suffix, tmp_path):
    make, expected = NOT_WEIGHTS[case]
    file = tmp_path / f"x{suffix}"
    file.write_bytes(make())
    with pytest.raises(UserError) as caught:
        read_weights(str(file))
    assert_one_sentence(str(caught.value), file)
    assert expected in str(caught.value)


def assert_one_sentence(message, file):
    assert message.startswith(f"'{file}' ") and message.endswith(".")
    rest = message.replace(str(file), "")
    assert "\n" not in rest and ". " not in rest and not re.search(r"\wError", rest), message


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("format", FORMATS)
def test_truncated(format, part, tmp_path):
    data = FORMATS[format]()
    file = tmp_path / "x.pth"
    file.write_bytes(data)
    assert set(read_weights(str(file)).state_dict) == {"a", "b"}
    file.write_bytes(data[: max(12, int(part * len(data)))])
    with pytest.raises(UserError) as caught:
        read_weights(str(file))
    assert_one_sentence(str(caught.value), file)
    assert "is truncated or damaged (" in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage(format, tmp_path):
    """A changed byte is either noticed, by name of the file, or harmless."""
    data, file = FORMATS[format](), tmp_path / "x.pth"
    for position in np.random.RandomState(0).randint(0, len(data), 60):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        try:
            read_weights(str(file))
        except UserError as error:
            assert str(error).startswith(f"'{file}' ")
