import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
    dump_toml,
    from_dict,
    load_toml,
    parse_count,
    split_source,
    to_dict,
)

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.", min_size=1, max_size=20)
sources = st.builds("{}:{}".format, words, words)
runs = st.builds(
    RunConfig,
    sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
    weights=st.sampled_from(["pretrained", "random", "/some/where"]),
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
            "learning_rate must be greater than 0",
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


def test_split_source_keeps_later_colons():
    assert split_source("model.tag:a:b") == ("model.tag", "a:b")
    assert to_dict(RunConfig(("m:l",)))["sources"] == ["m:l"]
