"""The scripts of docs/slurm: parsed by bash, and run with stand-ins for what only a SLURM cluster has."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from afterimage.config import AfterimageError, load_toml
from afterimage.config.study import StudyConfig
from afterimage.experiments.study import StudyShard, expand_study, study_groups
from afterimage.runs.files import read_json
from afterimage.runs.run import scan
from children import small_images

FOLDER = Path(__file__).parents[2] / "docs" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
STUDY = """
sources = ["test_resnet.r160_in1k:layer1", "test_vit.r160_in1k:block1"]
decoders = ["linear"]
weights = "random"
baselines = {baselines}
seeds = {seeds}
[data]
source = "folder:images"
resize = 48
crop = 32
"""
# What comes after the flags is run here; the flags have to be of the form --name=value or --overlap, as the scripts'.
SRUN = """
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SBATCH = """
echo "sbatch $*" >> "$LOG"
last=
while [[ $1 == --* ]]; do
    [[ $1 == --array=1-* ]] && last=${1#--array=1-}
    shift
done
script=$1
shift
bash -n "$script"
if [[ -n $last ]]; then
    for ((task = 1; task <= last; task++)); do SLURM_ARRAY_TASK_ID=$task bash "$script" "$@" >&2; done
else
    bash "$script" "$@" >&2
fi
echo "7;cluster"
"""
SCONTROL = """
[[ $1 == show && $2 == hostnames && $3 == "$SLURM_JOB_NODELIST" ]]
echo localhost
echo machine-2
"""
# As Ray's own: not before all machines are there.
WAITS = """
echo "waits for $3 at $2" >> "$LOG"
cat > "$LOG.py"
for ((tries = 0; tries < 600; tries++)); do
    (($(grep -c "^ray start" "$LOG") < $3)) || exit 0
    sleep 0.1
done
exit 1
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs a script in an empty folder with the stand-ins on PATH; gives the finished process and their log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"

    def stand_in(name, text):
        file = programs / name
        file.write_text(f"#!/bin/bash\nset -euo pipefail\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    for name, text in {"srun": SRUN, "sbatch": SBATCH, "scontrol": SCONTROL}.items():
        stand_in(name, text)
    stand_in("afterimage", f'exec "{sys.executable}" -m afterimage "$@"')
    stand_in("torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "RAY_")) and name != "AFTERIMAGE_WEIGHTS"
    }
    environment |= {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LOG": str(log),
        "AFTERIMAGE_CACHE": str(tmp_path / "cache"),
        "SLURM_JOB_NODELIST": "machine-[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
    }
    small_images(tmp_path / "images")

    def run(script, *arguments, **more):
        done = subprocess.run(
            ["bash", FOLDER / script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment | more,
        )
        return done, log.read_text().splitlines()

    run.stand_in = stand_in
    return run


def study(folder, baselines="false", seeds="[42]"):
    file = folder / "small.toml"
    file.write_text(STUDY.format(baselines=baselines, seeds=seeds))
    return load_toml(StudyConfig, file)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_parses_the_scripts(script):
    assert len(SCRIPTS) == 5
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text
    head = text[: text.index("set -euo pipefail")]
    assert all(line.startswith("#") for line in head.splitlines())  # sbatch reads no #SBATCH after a command
    assert "#SBATCH" in head or script.name == "submit.sh"


def test_the_page_names_every_script():
    page = (FOLDER.parent / "slurm.md").read_text()
    assert {f"slurm/{script.name}" for script in SCRIPTS} == set(re.findall(r"\((slurm/\w+\.sh)\)", page))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_parts_are_the_whole_study(tmp_path, count):
    configs = expand_study(study(tmp_path, seeds="[1, 2]"))
    groups = study_groups(configs)
    assert len(configs) == 4 and len(groups) == 4  # seeds have encoders and orders of their own
    parts = [StudyShard(number, count).of(configs) for number in range(1, count + 1)]
    together = [config.digest for part in parts for config in part]
    assert sorted(together) == sorted(config.digest for config in configs)
    assert StudyShard().of(configs) == configs


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "a/b", "-1/3", "1/2/3"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(AfterimageError, match="K/N"):
        StudyShard.parse(text)


@pytest.mark.long
def test_an_array_task_for_each_group_and_the_report_after_them(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a study's relative paths belong to the working folder
    configs = expand_study(study(tmp_path))
    done, log = slurm("submit.sh", "small.toml", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    submitted = [line for line in log if line.startswith("sbatch")]
    assert (
        len(submitted) == 2 and "--array=1-2" in submitted[0] and "--dependency=afterany:7 " in submitted[1]
    )
    steps = [line.removeprefix("srun afterimage study ") for line in log if line.startswith("srun")]
    assert steps == [
        "small.toml --device cpu --shard 1/2",
        "small.toml --device cpu --shard 2/2",
        "small.toml --device cpu",
    ]
    root = tmp_path / "runs" / "small"
    assert {run.name for run in scan(root)} == {config.name for config in configs}
    for run in scan(root):
        assert run.state == "done" and "--shard" in read_json(run.file("environment.json"))["command"]
    assert (root / "report" / "index.html").exists()
    assert "part 1/2 of the study; when all are done: afterimage report" in done.stderr


@pytest.mark.long
def test_torchrun_trains_one_run(slurm, tmp_path):
    done, log = slurm(
        "torchrun.sh",
        *("test_resnet.r160_in1k:layer1", "--decoders", "transposed", "--weights", "random", "--epochs", "1"),
        *("--data", "folder:images", "--resize", "48", "--crop", "32", "--device", "cpu"),
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="1",
    )
    assert done.returncode == 0, done.stderr
    (step,) = log
    assert "--rdzv-endpoint localhost:2" in step and "--nproc-per-node 1" in step
    (run,) = scan(tmp_path / "runs")
    assert run.state == "done"


@pytest.mark.parametrize("machines", [1, 2])
def test_ray_is_started_on_all_machines_and_given_the_study(slurm, tmp_path, machines):
    study(tmp_path)
    slurm.stand_in("ray", 'echo "ray $*" >> "$LOG"\nexec sleep 60')
    slurm.stand_in("python", WAITS)
    if machines == 2:
        slurm.stand_in("afterimage", "exit 3")
    done, log = slurm("ray.sh", "small.toml", "--dry-run", SLURM_NNODES=str(machines), SLURM_GPUS_ON_NODE="0")
    assert done.returncode == (3 if machines == 2 else 0), done.stderr
    assert machines == 2 or "2 groups of runs" in done.stdout
    ray = [line for line in log if line.startswith("ray ")]
    assert len(ray) == machines and sum("--head" in line for line in ray) == 1
    address = next(line for line in log if line.startswith("waits")).rpartition(" ")[2]
    assert re.fullmatch(r"localhost:2\d{4}", address)
    assert any(line.endswith(f"small.toml --dry-run --executor ray --address {address}") for line in log)
    compile((tmp_path / "log.py").read_text(), "ray.sh", "exec")
    scripts = pytest.importorskip(
        "ray.scripts.scripts", reason="Ray is not installed: its flags are not checked"
    )
    known = {flag for parameter in scripts.start.params for flag in parameter.opts}
    assert {flag.partition("=")[0] for line in ray for flag in line.split() if flag.startswith("--")} <= known


def test_a_signal_to_the_job_reaches_the_study_before_ray_ends(slurm, tmp_path):
    slurm.stand_in("ray", 'trap \'echo "ray ends" >> "$LOG"; kill $!; exit\' TERM\nsleep 60 & wait')
    slurm.stand_in("python", "cat > /dev/null")
    slurm.stand_in(
        "afterimage",
        'trap \'sleep 0.3; echo "study stops" >> "$LOG"; kill $!; exit 143\' TERM\n'
        'sleep 60 & sleep 0.5; kill -TERM "$JOB"; wait',
    )
    slurm.stand_in("job", f'export JOB=$$\nsource "{FOLDER}/ray.sh" small.toml')
    done, log = slurm(tmp_path / "bin" / "job", SLURM_NNODES="1")
    assert done.returncode == 143
    assert next(line for line in log if "srun" not in line) == "study stops"
