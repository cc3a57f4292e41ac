import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import stand_ins
from afterimage import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    Encoder,
    RecipeConfig,
    Reconstructor,
    RunConfig,
    create_decoder,
    load_data,
    train_runs,
)
from afterimage.evaluation.evaluate import evaluate
from afterimage.evaluation.metrics import Metrics
from afterimage.models.decoders import DECODERS
from afterimage.models.reconstructor import MultiEncoder
from afterimage.runs.files import read_json
from afterimage.runs.run import Run
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.distributed import ProcessGroup
from afterimage.training import feature_loader, trainer
from afterimage.training.checkpoint import load_reconstructor, load_tensors
from afterimage.training.feature_loader import FeatureLoader, RunContext
from simulated_runs import edit

MODEL = "test_resnet.r160_in1k"
SOURCES = [f"{MODEL}:layer1", f"{MODEL}:layer2"]


@pytest.fixture(scope="module")
def sample_images(tmp_path_factory):
    """Twenty smooth images of two colours each, easy to learn."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(20):
        ends = random.uniform(0, 255, (2, 3))
        ramp = np.linspace(0, 1, 48)[:, None, None]
        pixels = (ends[0] * ramp + ends[1] * (1 - ramp)) * np.ones((1, 60, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def config(sample_images):
    def make(source=SOURCES[0], decoder="transposed", *, seed=42, **recipe):
        return RunConfig(
            (source,),
            weights="random",
            decoder=DecoderConfig(decoder),
            data=DataConfig(f"folder:{sample_images}", resize=48, crop=32),
            recipe=RecipeConfig(**{"epochs": 3, "batch_size": 4} | recipe),
            seed=seed,
        )

    return make


@pytest.fixture
def go(tmp_path):
    def run(*configs, root="runs", **options):
        return train_runs(
            list(configs), tmp_path / root, cache=tmp_path / "cache", accelerator="cpu", **options
        )

    return run


def weights(run):
    return load_tensors(run.file("decoder.safetensors"))[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_folder_holds_everything(config, go):
    (run,) = go(config())
    result = run.result
    assert run.state == "done"
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert len(result.per_image) == result.data.test_images == len(run.images) == 2
    mean = np.mean([row["psnr"] for row in result.per_image])
    assert result.scores["psnr"].mean == pytest.approx(mean)
    assert result.training.parameters == sum(
        t.numel() for k, t in weights(run).items() if "running" not in k and "num_" not in k
    )
    assert result.weights[0].label == "random" and result.is_random and "random" in run.name
    assert result.training.images_seen == 3 * result.data.train
    assert result.training.best_validation_loss == min(row["validation_loss"] for row in run.history)
    assert not run.file("checkpoint.safetensors").exists()
    assert run.file("environment.json").exists() and run.config.sources == (SOURCES[0],)


def test_a_finished_run_is_left_alone(config, go):
    (run,) = go(config())
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    said = []
    go(config(), progress=lambda what, *_, **__: said.append(what))
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert said == [f"{run.name} is done already, nothing to do"]


def test_the_stored_decoder_is_the_best_one_and_scores_the_same_again(config, go, tmp_path):
    (run,) = go(config(epochs=4))
    reconstructor = load_reconstructor(run)
    test = load_data(run.config.data, cache=tmp_path / "cache").test
    rows, _ = evaluate(reconstructor, test, Metrics("squeeze"))
    for again, stored in zip(rows, run.result.per_image, strict=True):
        assert again["id"] == stored["id"] and again["psnr"] == pytest.approx(stored["psnr"], abs=1e-4)


def test_training_together_equals_training_alone(config, go):
    grid = [config(source, decoder) for source in SOURCES for decoder in ("transposed", "linear")]
    together = go(*grid, root="together")
    for run, one in zip(together, grid, strict=True):
        (alone,) = go(one, root="alone")
        assert same(weights(run), weights(alone))
        assert run.result.per_image == alone.result.per_image


@pytest.mark.parametrize(
    ("stop", "precision"), [(1, "32-true"), (7, "32-true"), (12, "32-true"), (7, "bf16-mixed")]
)
def test_a_stopped_run_goes_on_to_the_same_bits(config, go, monkeypatch, stop, precision):
    settings = {"epochs": 4, "precision": precision}
    (whole,) = go(config(**settings), root="whole")
    steps, step = [0], trainer.training_step

    def stopping(self, *arguments):
        if steps[0] == stop:
            raise KeyboardInterrupt
        steps[0] += 1
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            go(config(**settings), root="stopped")
    (resumed,) = go(config(**settings), root="stopped")
    assert same(weights(whole), weights(resumed))
    assert whole.result.per_image == resumed.result.per_image
    assert [r["validation_loss"] for r in whole.history] == [r["validation_loss"] for r in resumed.history]


def test_it_learns(config, go):
    (run,) = go(config(epochs=12, learning_rate=5e-3))
    first, *_, last = run.history
    assert last["validation_loss"] < first["validation_loss"] / 2


def test_the_encoder_does_not_change_by_a_bit(sample_images, tmp_path):
    data = load_data(DataConfig(f"folder:{sample_images}", resize=48, crop=32), cache=tmp_path)
    encoder = Encoder(f"{MODEL}:layer2", weights="random", image_size=32)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert any("running_var" in key for key in before)
    reconstructor = Reconstructor(encoder, create_decoder("transposed", encoder.specs, 32, seed=0))
    history = trainer.train(reconstructor, data, RecipeConfig(epochs=2, batch_size=4), accelerator="cpu")
    assert len(history) == 2 and same(before, encoder.state_dict())
    rows, _ = evaluate(reconstructor, data.test, Metrics("squeeze"))
    assert len(rows) == 2 and all(math.isfinite(row["psnr"]) for row in rows)


def test_a_closed_form_needs_no_epochs(sample_images, tmp_path):
    data = load_data(DataConfig(f"folder:{sample_images}", resize=48, crop=32), cache=tmp_path)
    encoder = Encoder(f"{MODEL}:layer1", weights="random-init", image_size=32)  # nearly linear
    reconstructor = Reconstructor(encoder, create_decoder("linear", encoder.specs, 32))
    assert trainer.train(reconstructor, data, accelerator="cpu") == []
    rows, _ = evaluate(reconstructor, data.test, Metrics("squeeze"))
    assert min(row["psnr"] for row in rows) > 20


def test_a_loss_that_is_not_finite_ends_one_run_and_no_other(config, go):
    failures = []
    bad, good = go(config(learning_rate=1e30), config(), failures=failures)
    assert good.state == "done" and bad.state == "failed"
    (error,) = failures
    assert bad.name in str(error) and "step" in str(error) and "learning_rate" in str(error)
    assert not bad.file("decoder.safetensors").exists() or weights(bad)


@pytest.mark.parametrize(
    ("broken", "split", "batches"),
    [
        (stand_ins.decoder("step 1", ValueError()), "validation", 0),
        (stand_ins.decoder("validation", ValueError()), "validation", 1),
        (stand_ins.closed_form("partial_fit", ValueError()), "train", 1),
    ],
)
def test_once_every_decoder_has_failed_nothing_is_encoded(config, go, monkeypatch, broken, split, batches):
    encode_batch, seen = FeatureLoader.encode_batch, []

    def watched(self, image_set, *arguments, **crop):
        seen.append(image_set is getattr(self.data, split))
        return encode_batch(self, image_set, *arguments, **crop)

    monkeypatch.setattr(FeatureLoader, "encode_batch", watched)
    monkeypatch.setitem(DECODERS, "transposed", broken)
    failures = []
    go(config(batch_size=1, epochs=1), failures=failures)
    assert len(failures) == 1 and sum(seen) == batches


@pytest.fixture
def loader(sample_images, tmp_path):
    data = load_data(DataConfig(f"folder:{sample_images}", resize=48, crop=32), cache=tmp_path)
    encoders = MultiEncoder(SOURCES[:1], weights="random-init", image_size=32)
    options = {"fabric": create_single_device_fabric("cpu", "32-true"), "seed": 0}

    def make(**context):
        return FeatureLoader(
            encoders, data, RecipeConfig(batch_size=1), context=RunContext(**context), **options
        )

    return make


def test_validation_features_that_do_not_fit_are_let_go(loader, monkeypatch):
    (_, images, features), *others = loader().validation_batches()
    assert others
    monkeypatch.setattr(feature_loader, "VALIDATION_BYTES", images.nbytes + features[0].nbytes)
    large = loader()
    for _ in range(2):
        batches = large.validation_batches()
        first = weakref.ref(next(batches)[1])
        next(batches)
        assert first() is None and len(list(batches)) == len(others) - 1


def test_ranks_keep_validation_features_together_or_not_at_all(loader):
    """The first parts are larger: a rank whose part fits encodes again if another rank's does not."""
    ranks = ProcessGroup()
    ranks.gather = lambda fits: [fits, False]
    one = loader(ranks=ranks)
    (first, *_), (again, *_) = (list(one.validation_batches()) for _ in range(2))
    assert first[1] is not again[1]


def test_the_best_checkpoint_survives_a_late_failure(config, go, monkeypatch):
    step = trainer.training_step

    def failing(self, features, images, count):
        if self.epoch == 2:
            features = [feature * math.nan for feature in features]
        step(self, features, images)

    monkeypatch.setattr(trainer, "training_step", failing)
    with pytest.raises(AfterimageError, match="the loss is nan in epoch 3, step 1"):
        go(config(epochs=4))
    (run,) = [Run.open(path) for path in (go.__closure__[0].cell_contents / "runs").iterdir()]
    assert run.state == "failed" and len(run.history) == 2
    assert all(tensor.isfinite().all() for tensor in weights(run).values() if tensor.is_floating_point())


def test_an_encoder_that_cannot_be_had_is_recorded(config, go):
    failures = []
    missing = config()
    object.__setattr__(missing, "weights", "/nowhere")
    run, other = go(missing, config(seed=7), failures=failures)
    assert run.state == "failed" and other.state == "done"
    assert "/nowhere" in str(failures[0])


def test_opening_refuses_other_weights(config, go):
    (run,) = go(config(decoder="linear"))
    (weights,) = read_json(run.file("summary.json"))["weights"]
    edit(run, weights=[weights | {"sha256": "0" * 64}])
    with pytest.raises(AfterimageError, match="digest 000000000000"):
        load_reconstructor(run)


def test_modules_do_not_hide_the_functions_of_their_name():
    import afterimage.evaluation.evaluate
    import afterimage.training.trainer

    assert callable(afterimage.train) and callable(afterimage.evaluate)
