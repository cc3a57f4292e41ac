"""What the command line changes of a study, and what a number of parameters does to its decoders."""

import pytest

from afterimage.cli.study import Study
from afterimage.config import AfterimageError, DecoderConfig, FusionConfig
from afterimage.config.study import RowConfig, StudyConfig, load_study
from afterimage.experiments.cost import estimate_cost
from afterimage.experiments.study import expand_study
from test_cli import MODEL, SMALL, command  # noqa: F401
from test_study import SMALL as STUDY


def test_flags_replace_the_studys_own_settings():
    study = Study(
        "published", data="procedural:9", resize=80, size="64", limit_train=5, limit_validation=3, limit_test=2,
        epochs=2, batch_size=4, seeds=(7, 8), loss="mse", precision="bf16-mixed", weights="random", lpips="squeeze",
    )._apply_options(load_study("published"))  # fmt: skip
    configs = expand_study(study)
    assert len(configs) == 30 and {config.seed for config in configs} == {7, 8}
    for config in configs:
        data, recipe = config.data, config.recipe
        assert (data.source, data.resize, data.crop) == ("procedural:9", 80, 64)
        assert (data.limit_train, data.limit_validation, data.limit_test) == (5, 3, 2)
        assert (recipe.epochs, recipe.batch_size, recipe.loss) == (2, 4, "mse"), "in rows of their own too"
        assert recipe.precision == "bf16-mixed"
        assert (config.weights, config.lpips) == ("random", "squeeze")


def test_without_flags_a_study_is_itself():
    for name in ("published", "fusion", "three_encoders", "quickstart"):
        assert Study(name)._apply_options(load_study(name)) == load_study(name)


def test_a_study_at_one_size():
    rows = (RowConfig((f"{MODEL}:layer1", f"{MODEL}:layer2"), fusion=FusionConfig("aligned")),)
    decoders = tuple(map(DecoderConfig, ("linear", "transposed", "residual")))
    study = StudyConfig(sources=STUDY.sources, rows=rows, decoders=decoders, data=STUDY.data)
    said = []
    configs = expand_study(Study(parameters="200k")._apply_options(study), lambda what, *_: said.append(what))
    assert said == ["the linear decoder has one size only, which it keeps beside 200,000"]
    for one in map(estimate_cost, configs):
        if one.config.decoder.name == "linear":
            assert one.config in expand_study(study)
        else:
            assert one.parameters == pytest.approx(200_000, rel=0.05)


def test_a_study_file_may_say_4m(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'sources = ["{MODEL}:layer1"]\ndecoders = ["attention"]\nparameters = "4M"\n')
    assert [config.decoder for config in expand_study(load_study(str(file)))] == [
        DecoderConfig("attention", 4_000_000)
    ]
    file.write_text(
        f'sources = ["{MODEL}:layer1"]\ndecoders = [{{ name = "attention", parameters = "250k" }}]\n'
    )
    assert [config.decoder.parameters for config in expand_study(load_study(str(file)))] == [250_000]
    file.write_text(f'sources = ["{MODEL}:layer1"]\nparameters = "much"\n')
    with pytest.raises(AfterimageError, match=r"mine\.toml: parameters must be a whole number"):
        load_study(str(file))


def test_train_at_a_size(command):  # noqa: F811
    code, out, err = command(
        "train", f"{MODEL}:layer1", "--decoder", "transposed", "--parameters", "50k", "--data",
        "procedural:10", "--epochs", 1, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    assert "transposed" in out
    code, _, err = command(
        "train", f"{MODEL}:layer1", "--decoders", "linear", "residual", "--parameters", "4M"
    )
    assert code == 1 and "--parameters: linear has one size only" in err and "residual" in err
    code, _, err = command("train", f"{MODEL}:layer1", "--parameters", "4G")
    assert code == 1 and "--parameters must be a whole number such as" in err


def test_a_plan_lists_what_cannot_be_built_and_the_rest(command):  # noqa: F811
    code, out, _ = command(
        "study", "--models", MODEL, "--layers", "layer*", "--decoders", "residual", "--parameters", "100k",
        "--data", "procedural:10", "--dry-run",
    )  # fmt: skip
    assert code == 0 and "4 runs, none started" in out and "GMAC/s" in out
    assert "cannot be built with 100,000 parameters" in out and "layer1" in out
