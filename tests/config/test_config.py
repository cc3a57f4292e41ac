import dataclasses
import os
from math import isfinite
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterimage.config import (
    MAX_PARAMETERS,
    MAX_SEED,
    RANDOM_WEIGHTS,
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
    absolute_path,
    absolute_source,
    absolute_weights,
    dump_toml,
    from_dict,
    load_toml,
    local_path,
    parse_count,
    size_pair,
    size_text,
    split_source,
    to_dict,
)
from afterimage.config.audit import AttackersConfig, AuditConfig
from afterimage.config.inversion import InversionConfig, InvertConfig
from afterimage.config.study import StudyConfig, load_study
from afterimage.data.sources.shards import expand

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.", min_size=1, max_size=20)
sources = st.builds("{}:{}".format, words, words)
runs = st.builds(
    RunConfig,
    sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
    weights=st.sampled_from(["pretrained", *RANDOM_WEIGHTS, "/some/where"]),
    fusion=st.none()
    | st.builds(FusionConfig, channels=st.integers(1, 512), size=st.none() | st.integers(1, 64)),
    decoder=st.builds(
        DecoderConfig, name=words, parameters=st.none() | st.integers(1, 10**8), options=st.just({"depth": 2})
    ),
    data=st.builds(DataConfig, limit_train=st.none() | st.integers(1, 100)),
    recipe=st.builds(
        RecipeConfig, epochs=st.integers(1, 99), learning_rate=st.floats(1e-9, 10), augment=st.booleans()
    ),
    seed=st.integers(0, 2**31),
    lpips=st.sampled_from(["alex", "vgg", "squeeze"]),
)


@given(runs)
def test_toml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(dump_toml(config))
    loaded = load_toml(RunConfig, path)
    assert loaded == config
    assert loaded.digest == config.digest and loaded.name == config.name


@given(runs, runs)
def test_hash_tells_runs_apart_but_not_how_they_are_measured(one, other):
    same = dataclasses.replace(one, lpips="alex") == dataclasses.replace(other, lpips="alex")
    assert (one.digest == other.digest) == same


def test_defaults_are_the_published_recipe():
    config = RunConfig(("resnet34.tv_in1k:layer1",))
    recipe = config.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (
        30,
        8,
        1e-3,
        1e-5,
    )
    assert (recipe.scheduler, recipe.plateau_factor, recipe.plateau_patience) == ("plateau", 0.5, 5)
    assert (recipe.loss, config.seed, config.decoder.name) == ("mse", 42, "attention")
    assert (config.data.source, config.data.resize, config.data.crop) == ("div2k", 256, 224)
    assert (config.data.validation_fraction, config.data.split_seed) == (0.2, 42)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ["a:b"], "recipe": {"epoch": 3}}, r"'recipe\.epoch'; did you mean 'recipe\.epochs'"),
        ({"sources": ["a:b"], "recipe": {"epochs": "3"}}, r"recipe\.epochs must be int, got '3'"),
        ({"sources": ["a:b"], "recipe": {"epochs": True}}, r"recipe\.epochs must be int"),
        ({"sources": ["a:b"], "recipe": {"epochs": 0}}, "epochs must be greater than 0"),
        (
            {"sources": ["a:b"], "recipe": {"learning_rate": float("nan")}},
            "learning_rate must be a finite number, got nan",
        ),
        ({"sources": ["a:b"], "recipe": {"plateau_factor": 1.0}}, "plateau_factor must be less than 1"),
        ({"sources": ["a:b"], "recipe": {"scheduler": "platau"}}, "did you mean 'plateau'"),
        ({"sources": ["a:b"], "recipe": 3}, "recipe must be a table"),
        ({"sources": "a:b"}, "sources must be a list"),
        ({"sources": []}, "at least one source"),
        ({"sources": ["resnet34"]}, "names no layer"),
        ({}, "missing setting: sources"),
        ({"sources": ["a:b"], "decoder": {"parameters": 4e6}}, r"decoder\.parameters must be a whole number"),
        ({"sources": ["a:b"], "decoder": {"parameters": "4G"}}, r"decoder\.parameters .* 250k or 1\.5M"),
        ({"sources": ["a:b"], "data": {"crop": 300}}, "must not be larger than resize"),
        ({"sources": ["a:b"], "data": {"test_fraction": 1.0}}, "between 0 and 1"),
        ({"sources": ["a:b"], "lpips": "alexnet"}, "did you mean 'alex'"),
        ({"sources": ["a:b"], "data": {"crop": 10}}, "crop must lie between 11"),
        ({"sources": ["a:b"], "recipe": {"loss": "mse + lpip"}}, "unknown loss 'lpip'"),
        (
            {"sources": ["a:b"], "recipe": {"loss": "lpips"}, "data": {"crop": 30}},
            "crop of 31 pixels or more",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(AfterimageError, match=message):
        from_dict(RunConfig, settings)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4M", 4_000_000), ("250k", 250_000), ("1.5M", 1_500_000), ("4_000_000", 4_000_000), (7, 7)],
)
def test_numbers_of_parameters_may_be_written_short(text, number):
    config = from_dict(RunConfig, {"sources": ["a:b"], "decoder": {"parameters": text}})
    assert config.decoder.parameters == parse_count(text, "--parameters") == number


@pytest.mark.parametrize(
    "text", ["", "M", "1.5", "0", "-1", "0.0001k", "4 M x", "1__0", "20000M", 0, -3, True, 1.0]
)
def test_what_is_no_number_of_parameters_is_an_error(text):
    with pytest.raises(AfterimageError, match="--parameters must be a whole number such as"):
        parse_count(text, "--parameters")


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "broken.toml"
    for content in (b"a = [", b"\xff\xfe", b"sources = ['a:b']\nseeds = 3"):
        path.write_bytes(content)
        with pytest.raises(AfterimageError, match=r"broken\.toml"):
            load_toml(RunConfig, path)
    with pytest.raises(AfterimageError, match=r"missing\.toml"):
        load_toml(RunConfig, tmp_path / "missing.toml")


@given(st.text(max_size=200))
def test_any_text_is_a_config_or_one_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(AfterimageError):
        load_toml(RunConfig, path)


def test_several_sources_get_a_fusion():
    assert RunConfig(("a:b", "c:d")).fusion == FusionConfig()
    assert RunConfig(("a:b",)).fusion is None


def test_run_names_are_safe_folder_names():
    config = RunConfig(("../../etc/passwd:a b<script>",))
    assert "/" not in config.name and "<" not in config.name and not config.name.startswith(".")


def test_a_layer_comes_after_the_last_colon():
    assert split_source("open_clip/ViT-B-32::openai:visual") == ("open_clip/ViT-B-32::openai", "visual")
    assert split_source("hf-hub:owner/name:layer") == ("owner/name", "layer")
    assert to_dict(RunConfig(("m:l",)))["sources"] == ["m:l"]


NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1,
    0,
    1,
    10**9,
    10**12,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
)
OWNERS = {
    DataConfig: {},
    DecoderConfig: {},
    FusionConfig: {},
    RecipeConfig: {},
    RunConfig: {"sources": ("a:b",)},
    StudyConfig: {"sources": ("a:b",)},
    InvertConfig: {},
    InversionConfig: {
        "sources": ("a:b",), "weights": "random", "start": "", "inversion": InvertConfig(), "data": DataConfig(),
    },
    AttackersConfig: {},
    AuditConfig: {"model": "a", "layers": ("b",)},
}  # fmt: skip


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_every_number_has_limits_that_a_run_folder_can_hold(owner, tmp_path):
    """Whatever number a setting is given: it is refused with its name, or written, read back and used as a number."""
    given = OWNERS[owner]
    default = owner(**given)
    numbers = [
        f.name
        for f in dataclasses.fields(owner)
        if f.type.removesuffix(" | None") in ("int", "float", "Count")
    ]
    for name in numbers:
        whole = dict((f.name, f.type) for f in dataclasses.fields(owner))[name].startswith(("int", "Count"))
        for number in NUMBERS:
            if (whole and isinstance(number, float)) or (not whole and number == NUMBERS[-1]):
                continue
            number = number if whole else float(number)
            try:
                config = dataclasses.replace(default, **{name: number})
            except AfterimageError as error:
                assert name in str(error) or "crop" in str(error), (name, number, str(error))
                continue
            (tmp_path / "a.toml").write_text(dump_toml(config))
            assert load_toml(owner, tmp_path / "a.toml") == config
            assert (
                0 <= number <= (MAX_SEED if "seed" in name else MAX_PARAMETERS) if whole else isfinite(number)
            )


@given(st.integers())
def test_seeds_are_what_every_generator_takes(seed):
    import numpy as np
    import torch

    try:
        config = RunConfig(("a:b",), seed=seed)
    except AfterimageError as error:
        assert "seed must lie between 0 and 9,223,372,036,854,775,807" in str(error)
        assert not 0 <= seed <= MAX_SEED
        return
    torch.Generator().manual_seed(config.seed + 100)
    np.random.default_rng(config.seed)


def test_one_place_is_one_run_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = ["x", "x/", "./x", ".//x/.", "other/../x", "~/x", str(tmp_path / "x"), f"{tmp_path}/./x/"]
    for kind in ("folder", "div2k"):
        configs = [
            RunConfig(("a:b",), data=DataConfig(f"{kind}:{text}", test=f"{kind}:{text}"))
            for text in spellings
        ]
        assert len({config.digest for config in configs}) == len({config.name for config in configs}) == 1
        assert configs[0].data.source == configs[0].data.test == f"{kind}:{tmp_path}/x"
    assert len({RunConfig(("a:b",), weights=text).digest for text in spellings}) == 1
    assert len({AuditConfig(pairs=f"{text}/s.npz").pairs for text in spellings}) == 1
    assert len({AuditConfig(model=f"python/{text}/n.py:f", layers=("a",)).model for text in spellings}) == 1
    assert AuditConfig(model="python/package.module:f", layers=("a",)).model == "python/package.module:f"
    text = 'sources = ["a:b"]\nweights = "./w"\n[data]\nsource = "folder:./x"\n'
    text += '[[rows]]\nsources = ["c:d"]\nweights = "w"\n'
    (tmp_path / "study.toml").write_text(text)
    study = load_study("study.toml")
    assert study.data.source == f"folder:{tmp_path}/x"
    assert study.weights == study.rows[0].weights == f"{tmp_path}/w"


@pytest.mark.parametrize("word", ["pretrained", "random", "random-init"])
def test_what_is_no_path_stays_as_it_is(word):
    assert absolute_weights(word) == word and absolute_weights("") == ""
    for source in ("div2k", "procedural", "procedural:12", "photographs", "folder:", "imagenet", "files:ab"):
        assert absolute_source(source) == source


def test_the_digests_of_runs_without_paths_are_those_of_before():
    digests = {
        "f3f09328": RunConfig(("resnet34.tv_in1k:layer1",)),
        "874d3c2d": RunConfig(
            ("a:b", "c:d"), weights="random", data=DataConfig("procedural:40", resize=64, crop=64)
        ),
        "0b8ae298": RunConfig(("a:b",), data=DataConfig("photographs", test="procedural:5"), seed=7),
    }
    assert {config.digest[:8] for config in digests.values()} == set(digests)


def test_a_protocol_says_size_and_layers():
    rae = DataConfig("photographs", protocol="rae")
    assert (rae.resize, rae.crop) == (256, 256) and from_dict(DataConfig, to_dict(rae)) == rae
    assert DataConfig("photographs", protocol="study") == DataConfig("photographs")
    for layer in ("norm", "latents"):
        RunConfig((f"m:{layer}",), data=rae)
    with pytest.raises(AfterimageError, match="protocol rae reads m:norm or m:latents, got m:block3"):
        RunConfig(("m:block3",), data=rae)
    with pytest.raises(AfterimageError, match="protocol rae has resize 256, got 518"):
        DataConfig(resize=518, crop=518, protocol="rae")
    for name, size, resize in (("rae", "224", None), ("study", "256", None), ("rae", "", 300)):
        with pytest.raises(
            AfterimageError, match=f"protocol {name} has (crop|resize) 2.., got {size or resize}"
        ):
            DataConfig("photographs").with_overrides(size, resize, name)
    assert DataConfig("photographs").with_overrides("256", None, "rae") == rae == rae.with_overrides()
    assert DataConfig("photographs").with_overrides("64x96", 80) == DataConfig("photographs").with_size(
        "64x96", 80
    )
    with pytest.raises(AfterimageError, match=r"unknown protocol 'ra'; did you mean 'rae'"):
        DataConfig(protocol="ra")


def test_links_keep_their_names_but_two_dots_go_where_the_system_goes(tmp_path):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    assert absolute_path(f"{tmp_path}/link") == f"{tmp_path}/link"
    assert absolute_path(f"{tmp_path}/link/../x") == f"{tmp_path}/far/x"


def test_patterns_of_shards_mean_the_same_from_everywhere(tmp_path, monkeypatch):
    here = tmp_path / "a[1]*"
    (here / "data").mkdir(parents=True)
    for i in range(3):
        (here / "data" / f"{i}.tar").touch()
    (tmp_path / "a1x").mkdir()
    files = [here / "data" / f"{i}.tar" for i in range(3)]
    monkeypatch.chdir(here)
    found = {
        text: absolute_source(f"webdataset:{text}").partition(":")[2]
        for text in ("data/{0..2}.tar", "./data/*.tar", "data/{0,1,2}.tar", "data//?.tar")
    }
    monkeypatch.chdir(tmp_path)
    for text, pattern in found.items():
        assert expand(pattern) == files, text
    inside = f"{{{files[0]},{files[1]}}}"
    assert absolute_source(f"parquet:{inside}") == f"parquet:{inside}"
    braces = tmp_path / "a{1,2}"
    braces.mkdir()
    monkeypatch.chdir(braces)
    with pytest.raises(AfterimageError, match="braces in its name"):
        absolute_source("parquet:*.parquet")


@given(
    st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name and not name.startswith(b"~"))
)
def test_any_name_of_a_file_is_kept(name):
    path = os.fsdecode(name)
    absolute = absolute_path(path)
    absolute.encode()
    assert absolute_path(absolute) == absolute
    assert Path(local_path(absolute)).resolve() == Path(path).resolve()
    config = DataConfig(f"folder:{path}")
    assert DataConfig(**to_dict(config)) == config


def test_a_size_is_a_side_or_height_by_width():
    assert [size_pair(size) for size in (7, "7", (3, 5), "3x5")] == [(7, 7), (7, 7), (3, 5), (3, 5)]
    assert [size_text(size_pair(size)) for size in ("256x256", "256x384")] == ["256", "256x384"]
    for wrong in ("", "x", "3x", "ax3", "3x5x7", "0", "-3", "3.5", (3, 5, 7)):
        with pytest.raises(
            AfterimageError, match="the side of a square in pixels, such as 224, or HEIGHTxWIDTH"
        ):
            size_pair(wrong)


def test_one_size_has_one_digest():
    """However a size is written; and images of another shape are another run."""
    configs = [RunConfig(("a:b",), data=DataConfig(crop=crop)) for crop in (224, "224", "224x224", "224x256")]
    assert len({config.digest for config in configs}) == 2
    assert configs[0].digest == configs[2].digest and to_dict(configs[2])["data"]["crop"] == 224
    assert from_dict(RunConfig, to_dict(configs[3])) == configs[3] and configs[3].data.size == (224, 256)


def test_a_size_brings_the_resize_that_it_needs():
    data = DataConfig()
    assert (
        data.with_size("384").resize,
        data.with_size("64x96").resize,
        data.with_size("64", 80).resize,
    ) == (
        384,
        256,
        80,
    )
    with pytest.raises(AfterimageError, match=r"crop .384x512. must not be larger than resize .300."):
        data.with_size("384x512", 300)
    with pytest.raises(AfterimageError, match=r"data.crop must be int, got a list"):
        from_dict(RunConfig, {"sources": ["a:b"], "data": {"crop": [3, 5]}})
    with pytest.raises(AfterimageError, match="needs an encoder, whose size it is"):
        _ = data.with_size("native").size
