import os
from pathlib import Path

# Before the package: what an instrumented module imports first is compiled anew in every process.
import lightning_fabric  # noqa: F401
import pytest
import timm  # noqa: F401
import torch

# Tests run side by side, one process a core: threads of their own would only wait for each other.
torch.set_num_threads(1)

SHARED = Path(os.environ.get("AFTERIMAGE_SHARED", Path(__file__).parents[2] / "shared"))


def _folder(name: str, *contents: str) -> Path:
    path = SHARED / name
    if not all((path / content).exists() for content in contents or ("",)):
        pytest.skip(f"needs {path}: real {name} are not part of the project")
    return path


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """A folder of real pretrained weights; the test skips where it is missing."""
    return _folder("weights")


@pytest.fixture(scope="session")
def photos_folder() -> Path:
    """A folder with `train` and `test` photographs; the test skips where it is missing."""
    return _folder("photos", "train", "test")


@pytest.fixture(scope="module")
def sample_images(tmp_path_factory) -> Path:
    """A folder of twenty small images."""
    from children import small_images

    return small_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Reports without figures, which take most of the time that a small report takes."""
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder for decoded images."""
    return tmp_path_factory.mktemp("cache")
