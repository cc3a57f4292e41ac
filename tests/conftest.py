import builtins
import os
import re
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

# The same examples in each run, so that a failure comes from the tested change. AFTERIMAGE_FUZZ=N draws new
# examples, and N times as many in tests that damage input.
settings.register_profile("same examples", derandomize="AFTERIMAGE_FUZZ" not in os.environ)
settings.load_profile("same examples")


def pytest_configure(config) -> None:
    """Import torch in the processes that run tests, but not in the one that only distributes them."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    # Before the package: modules first imported by an instrumented module are compiled anew in every process.
    import lightning_fabric  # noqa: F401
    import timm  # noqa: F401
    import torch

    # Tests run in parallel, one process per core: more threads would only wait for each other.
    torch.set_num_threads(1)


def _jaxtyped(*, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """Return a decorator that checks annotations, except those of nested functions.

    The checks of a nested function would be compiled anew in each call of the outer one. Shapes of arrays are
    compared with each other only in functions whose annotations name arrays, or a type that is not yet
    defined, since this takes far longer than all other checks.
    """

    def check(found):
        if "<locals>" in getattr(found, "__qualname__", ""):
            return found
        if _names_arrays(found):
            return jaxtyped(typechecker=typechecker)(found)
        written = dict(found.__annotations__)
        checked = typechecker(found)
        # As written in the source, for the reference.
        found.__annotations__ = checked.__annotations__ = written
        return checked

    return check


def _names_arrays(found) -> bool:
    if isinstance(found, type):
        return True
    names = re.findall(r"(?<![.\w'\"])[A-Za-z_]\w*", " ".join(map(str, found.__annotations__.values())))
    known = vars(builtins) | found.__globals__
    return any(n not in known or getattr(known[n], "__module__", "").startswith("jaxtyping") for n in names)


jaxtyping.jaxtyped = _jaxtyped  # `--jaxtyping-packages` decorates every function of the package with it

SHARED = Path(os.environ.get("AFTERIMAGE_SHARED", Path(__file__).parents[2] / "shared"))


def _folder(name: str, *contents: str) -> Path:
    path = SHARED / name
    if not all((path / content).exists() for content in contents or ("",)):
        pytest.skip(f"needs {path}: real {name} are not part of the project")
    return path


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """Return the folder of real pretrained weights; skip the test if it is missing."""
    return _folder("weights")


@pytest.fixture(scope="session")
def photos_folder() -> Path:
    """Return the folder of `train` and `test` photographs; skip the test if it is missing."""
    return _folder("photos", "train", "test")


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory) -> Path:
    """Return a folder of twenty small images."""
    from children import small_images

    return small_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def whole(sample_images, tmp_path_factory) -> list[dict]:
    """Return the results of `small_configs`, trained in one process without interruption."""
    from afterimage import train_runs
    from children import result, small_configs

    folder = tmp_path_factory.mktemp("whole")
    runs = train_runs(small_configs(sample_images), folder, cache=folder / "cache", accelerator="cpu")
    return [result(run) for run in runs]


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Write reports without figures, which take most of the time of a small report."""
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Return a folder for decoded images."""
    return tmp_path_factory.mktemp("cache")
