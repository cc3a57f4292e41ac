"""Writes the ways in to `corpus/`: `python tests/fuzz/make_corpus.py`. Inputs found by fuzzing lie beside them.

All of it is made here, so it has no other source and no licence of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import sys
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / "fixtures"), str(Path(__file__).parent)]

import targets  # noqa: E402
from some_images import png, some_image  # noqa: E402

SIZE = (12, 9)


def keep(target: str, name: str, content: bytes | str) -> None:
    path = targets.CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def encoded(sample_image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    sample_image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def sample_images() -> None:
    colour = some_image(1, *SIZE)
    grey = colour.convert("L")
    frames = [some_image(i, *SIZE) for i in (2, 3)]
    for kind, end in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("PPM", "ppm"),
        ("JPEG2000", "jp2"),
        ("AVIF", "avif"),
    ):
        keep("image", f"plain.{end}", encoded(colour, kind))
    for kind, end in (("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif"), ("MPO", "mpo")):
        keep("image", f"frames.{end}", encoded(colour, kind, save_all=True, append_images=frames))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        own = Image.fromarray(np.asarray(grey, np.uint16) * 257) if mode == "I;16" else colour.convert(mode)
        keep("image", f"{mode.replace(';', '')}.png", encoded(own, "PNG"))
    for mode in ("CMYK", "LAB", "F", "I", "YCbCr"):
        own = (
            grey.point(lambda v: v / 255, "F")
            if mode == "F"
            else colour.convert(mode)
            if mode != "I"
            else grey.convert("I")
        )
        keep("image", f"{mode}.tif", encoded(own, "TIFF"))
    keep("image", "CMYK.jpg", encoded(colour.convert("CMYK"), "JPEG"))
    keep("image", "nan.tif", encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))
    keep("image", "key.png", encoded(colour, "PNG", transparency=(9, 9, 9)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, end in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        keep("image", f"turned.{end}", encoded(colour, kind, exif=exif))
    keep("image", "exif.jpg", encoded(colour, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    keep("image", "profile.jpg", encoded(colour, "JPEG", icc_profile=b"\0\0\0\x80nonsense" * 9))
    whole = encoded(colour, "PNG")
    keep("image", "cut.png", whole[:-20])
    keep("image", "cut.jpg", encoded(colour, "JPEG")[:-30])
    for name, width, height in (("zero", 0, 5), ("huge", 2**31 - 1, 2**31 - 1), ("wide", 2**21, 1)):
        keep("image", f"{name}.png", png(width, height, 8, 0, b""))
    keep("image", "strip.png", encoded(Image.new("L", (4000, 1)), "PNG"))
    # A text chunk and a profile that unpack to far more than they hold.
    bomb = zlib.compress(bytes(4 * 10**6), 9)
    keep("image", "text.png", whole[:33] + chunk(b"zTXt", b"a\0\0" + bomb) + whole[33:])
    keep("image", "iccp.png", whole[:33] + chunk(b"iCCP", b"a\0\0" + bomb) + whole[33:])
    keep("image", "empty", b"")
    keep("image", "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def studies() -> None:
    for entry in (resources.files("afterimage.config") / "studies").iterdir():
        if entry.name.endswith(".toml"):
            keep("study", entry.name, entry.read_bytes())
    keep(
        "study",
        "run.toml",
        f"""
sources = ["{targets.MODEL}:layer1", "{targets.MODEL}:layer2"]
weights = "random"
seed = 3
lpips = "squeeze"
[fusion]
name = "attention"
channels = 16
size = 8
[decoder]
name = "residual"
parameters = "250k"
[decoder.options]
blocks = 1
[data]
source = "folder:../../somewhere"
[recipe]
epochs = 2
loss = "0.5*mse + 0.5*lpips"
""",
    )
    keep(
        "study",
        "escape.toml",
        'sources = ["resnet18:../../x", "../../etc:passwd"]\nweights = "../../../etc/passwd"\n',
    )
    keep("study", "baseline.toml", 'baseline = "../../../etc/passwd"\n')
    keep(
        "study",
        "audit.toml",
        'model = "resnet18"\nlayers = ["layer1"]\n[attackers]\nimages = [5, "all"]\n[limits]\nmax_ssim = 0.5\n',
    )
    for kind in ("attention", "transposed", "linear", "wavelet", "frequency", "residual"):
        keep(
            "study",
            f"{kind}.toml",
            f'sources = ["{targets.MODEL}:layer1"]\ndecoders = [{{name = "{kind}", options = {{}}}}]\n[data]\nresize=32\ncrop=32\n',  # noqa: E501
        )


def runs() -> None:
    good = targets._good()
    text = {name: content for name, content in good.items() if not name.endswith(".png")}
    summary = json.loads(good["summary.json"])
    keep("run", "whole", targets.bundle(text))
    keep(
        "verify",
        "baseline",
        targets.bundle(
            {
                "summary.json": json.dumps(summary | {"kind": "baseline", "training": None}),
                "config.toml": 'baseline = "mean"\n[data]\nsource = "procedural:6"\nresize = 32\ncrop = 24\n',
                "scores.csv": good["scores.csv"],
            }
        ),
    )
    keep(
        "verify",
        "decoder",
        targets.bundle(
            {
                "summary.json": good["summary.json"],
                "config.toml": good["config.toml"]
                .replace(b"224", b"24")
                .replace(b"256", b"32")
                .replace(b'weights = "pretrained"', b'weights = "random"'),
            }
        ),
    )
    index = [{"id": "<script>alert(1)</script>", "original": "000.original.png", "reconstruction": "000.png"}]
    keep("run", "images", targets.bundle({"index.json": json.dumps(index)}))
    for name, place in (
        ("escape", "../../../good/reconstructions/000.png"),
        ("absolute", "/etc/passwd"),
        ("number", 7),
    ):
        keep("run", name, targets.bundle({"index.json": json.dumps([index[0] | {"original": place}])}))
    hostile = summary | {
        "label": "=cmd|' /C calc'!A0",
        "notes": ["<script>", "\\input{/etc/passwd}", "-1+1"],
        "data": summary["data"] | {"source": "@SUM(1+1)"},
    }
    keep("run", "names", targets.bundle({"summary.json": json.dumps(hostile)}))
    keep("run", "deep", targets.bundle({"summary.json": "[" * 5000, "status.json": "{}"}))
    keep(
        "run",
        "lists",
        targets.bundle(
            {name: "[]" for name in ("summary.json", "environment.json", "status.json", "index.json")}
        ),
    )
    keep("run", "numbers", targets.bundle({"scores.csv": "id,psnr,ssim,lpips\na,1e999,nan,-1\na,,,\n"}))
    keep("run", "no-ids", targets.bundle({"scores.csv": "name,psnr\na,1\n"}))
    keep(
        "run",
        "history",
        targets.bundle({"history.csv": "epoch,validation_loss,learning_rate\nx,1,2\n1,-1,inf\n"}),
    )
    row = {"id": "a"}
    names = ("own", "another", "shuffled", "mean", "zero", "colour")
    row |= {f"{name}_psnr": 10.0 for name in names}
    common = {"format": 1, "images": 1, "decoder": "digest"}
    keep(
        "run",
        "controls",
        targets.bundle(
            {
                "controls.json": json.dumps(
                    common
                    | {
                        "controls": {},
                        "lpips": {"net": "alex"},
                        "distances": {"reencoded": 0.1, "random_pair": 1.0},
                    }
                ),
                "controls.csv": ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n",
                "rate_distortion.json": json.dumps(
                    {
                        **common,
                        "coder": "bzip2",
                        "range": [0.001, 0.999],
                        "training_images": 4,
                        "points": [{"bits": 8, "bits_per_pixel": 3.0, "psnr": 20.0}],
                        "codecs": [
                            {"codec": c, "quality": 50, "bits_per_pixel": b, "psnr": p}
                            for c, b, p in (
                                ("JPEG", 1.0, 20.0),
                                ("JPEG", 4.0, 30.0),
                                ("WebP", 1.0, 22.0),
                                ("lossless", 9.0, None),
                            )
                        ],
                    }
                ),
                "rate_distortion.csv": "id,bits,psnr\na,8,20.0\n",
                "error_breakdown.json": json.dumps(
                    {
                        **common,
                        "frequencies": [0.1, 0.3],
                        "place": [[0.1]],
                        "spectra": {
                            p: {k: [1.0, 0.5] for k in ("error", "image", "reconstruction", "shared")}
                            for p in ("luma", "chroma")
                        },
                        "planes": {p: {"error": 0.1, "variance": 1.0} for p in ("luma", "cb", "cr")},
                        "regions": {"window": 7, "flat_below": 0.02, "edge_from": 0.5}
                        | {k: {"share": 0.3, "mse": 0.01} for k in ("flat", "edge", "texture")},
                    }
                ),
                "error_breakdown.csv": "id,psnr_luma,psnr_cb,psnr_cr\na,20,30,30\n",
            }
        ),
    )
    for name in ("whole", "names", "controls", "history"):
        keep("report", name, (targets.CORPUS / "run" / name).read_bytes())


def stores() -> None:
    from safetensors.numpy import save

    random = np.random.default_rng(0)
    arrays = {
        "images": random.integers(0, 256, (8, 3, 4, 4), dtype=np.uint8),
        "features": random.normal(size=(8, 2, 2, 2)).astype(np.float16),
    }
    ids = {"ids": np.array([f"p{i}" for i in range(8)])}

    def npz(values) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, **values)
        return file.getvalue()

    keep("pairs", "whole.safetensors", save(arrays))
    keep("pairs", "whole.npz", npz(arrays | ids))
    keep("pairs", "pickled.npz", npz(arrays | {"ids": np.array([{}] * 8, object)}))
    for name, change in {
        "scalar": {"features": np.array(3.0)},
        "none": {k: v[:0] for k, v in arrays.items()},
        "ids": {"ids": np.array("p")},
        "complex": {"features": arrays["features"].astype(np.complex64)},
        "times": {"features": np.zeros((8, 2), "m8[s]")},
        "no-channels": {"features": np.zeros((8, 0, 2, 2))},
        "no-pixels": {"images": np.zeros((8, 3, 0, 4), np.uint8)},
        "tokens": {"features": np.zeros((8, 5, 3), np.float32)},
        "beyond": {"features": np.full((8, 2), 1e300)},
        "bytes": {"ids": np.array([b"a%d" % i for i in range(8)])},
    }.items():
        keep("pairs", f"{name}.npz", npz(arrays | change))

    def safe(header: object, content: bytes = bytes(64)) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content

    entry = {"shape": [8, 2], "data_offsets": [0, 32]}
    for kind in ("BF16", "F8_E4M3", "F16", "NONE"):
        size = 1 if kind.startswith("F8") else 2
        keep(
            "weights",
            f"{kind}.safetensors",
            safe({"a": entry | {"dtype": kind, "shape": [8, 4 // size]}}, bytes(32)),
        )
    bf16 = {
        "images": {"dtype": "U8", "shape": [8, 3, 1, 1], "data_offsets": [0, 24]},
        "features": {"dtype": "BF16", "shape": [8, 2], "data_offsets": [24, 56]},
    }
    keep("pairs", "bf16.safetensors", safe(bf16, bytes(56)))
    keep("weights", "huge.safetensors", struct.pack("<Q", 2**63) + b"{}")
    keep(
        "weights",
        "overlap.safetensors",
        safe(
            {
                "a": {"dtype": "F16", "shape": [16], "data_offsets": [0, 32]},
                "b": {"dtype": "F16", "shape": [16], "data_offsets": [16, 48]},
            }
        ),
    )
    keep(
        "weights",
        "large-shape.safetensors",
        safe({"a": {"dtype": "F16", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}),
    )
    keep(
        "weights",
        "deep.safetensors",
        safe(
            {
                "__metadata__": {"made_for": "[" * 5000},
                "a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
            }
        ),
    )
    keep(
        "weights",
        "list.safetensors",
        safe(
            {
                "__metadata__": {"made_for": "[1]", "facts": "[]", "sha256": ""},
                "a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
            }
        ),
    )
    keep("weights", "cut.safetensors", save(arrays)[:-5])
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        return
    file = io.BytesIO()
    encoded_images = [encoded(some_image(i, 4, 4), "PNG") for i in range(8)]
    table = pa.table(
        {
            "images": encoded_images,
            "features": arrays["features"].reshape(8, -1).astype(np.float32).tolist(),
        }
    )
    parquet.write_table(table, file)
    keep("pairs", "whole.parquet", file.getvalue())


def checkpoints() -> None:
    import torch
    from safetensors.torch import save

    from afterimage.training.checkpoint import _digest

    tensors, text = {"total": torch.zeros(())}, json.dumps({"identity": {}})
    keep(
        "weights", "checkpoint.safetensors", save(tensors, {"facts": text, "sha256": _digest(tensors, text)})
    )
    for name, text in (("facts-list", "[]"), ("facts-deep", "[" * 5000), ("facts-none", "")):
        keep(
            "weights", f"{name}.safetensors", save(tensors, {"facts": text, "sha256": _digest(tensors, text)})
        )
    for name, legacy in (("zip", False), ("legacy", True)):
        file = io.BytesIO()
        torch.save({"state_dict": {"a": torch.zeros(2)}}, file, _use_new_zipfile_serialization=not legacy)
        keep("weights", f"{name}.pth", file.getvalue())
    array = {"a": np.arange(3.0), "b": np.array(["text"])}
    beside = {"model": array, "args": argparse.Namespace(rate=0.1), "best": np.float64(1), "seen": {1}}
    strangers = {
        "code": {"a": print},
        "beside": beside,
        "module": torch.nn.Sequential(torch.nn.Linear(2, 1)),
        "parameter": {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.zeros(3)[1:]},
    }
    for name, content in strangers.items():
        file = io.BytesIO()
        torch.save(content, file)
        keep("weights", f"{name}.pth", file.getvalue())
    keep("weights", "pickle.pth", pickle.dumps(beside, protocol=2))
    keep(
        "weights",
        "pointer.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    )
    keep("weights", "page.safetensors", b"<!doctype html><title>Sign in</title>")


if __name__ == "__main__":
    for make in (sample_images, studies, runs, stores, checkpoints):
        make()
